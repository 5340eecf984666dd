"""Attention's gradients of keys and values in Triton: ``triton_queries_kernels.py`` with the sides exchanged."""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.attention.triton_pieces import (
    at_head,
    indices,
    logits,
    meets,
    own_side,
    take,
    tile_of,
    visible,
    within,
    work,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["l", "m", "tiles", "parts", "zero", "left", "right"])
def keys_backward(
    q,
    k,
    v,
    slopes,
    dout,
    tops,
    delta,
    dk,
    dv,
    cu_seqlens,
    cu_seqlens_k,
    q_positions,
    k_positions,
    owners,
    starts,
    offsets,
    listed,
    patterns,
    bits,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    offsets_head,
    l,
    m,
    tiles,
    parts,
    zero,
    left,
    right,
    factor,
    cap,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_Q: tl.constexpr,
    MASK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One tile of keys: dk (parts b m H/GROUP K) and dv (parts b m H/GROUP V), each part over HEADS of a group's heads.

    One of them may be None. Tiles are transposed: a row for each key, a column for each query.
    """
    task = tl.program_id(0)
    number, task = task % tiles, task // tiles
    part, task = task % parts, task // parts
    heads_k: tl.constexpr = H // GROUP
    head_k, batch = task % heads_k, (task // heads_k).to(tl.int64)
    start, stop, _, end, begin_q, end_q = tile_of(
        number, owners, starts, cu_seqlens_k, cu_seqlens, m, l, MASK_K, COLUMNS
    )
    if start >= stop:
        return
    if q_positions is not None:
        q_positions, k_positions = q_positions + batch * l, k_positions + batch * m
    j, p, low, high, met = own_side(start, stop, end_q - end, k_positions, begin_q, end_q, right, left, COLUMNS)
    across_k, across_v = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_V)[None, :]
    k = at_head(k, k_strides, batch, head_k, across_k)
    v = at_head(v, v_strides, batch, head_k, across_v)
    keys = take(k, j, k_strides[1], start, stop, K, BLOCK_K, True)
    if dk is not None:
        values = take(v, j, v_strides[1], start, stop, V, BLOCK_V, True)
        own_k = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
    if dv is not None:
        own_v = tl.zeros((COLUMNS, BLOCK_V), tl.float32)
    # What is the same for all heads is not carried in registers through the loops over queries
    for g in tl.range(part * HEADS, tl.minimum(part * HEADS + HEADS, GROUP), disable_licm=True):
        head = head_k * GROUP + g
        q_of, dout_of = at_head(q, q_strides, batch, head, across_k), at_head(dout, dout_strides, batch, head, across_v)
        sums = (batch * H + head) * l
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + head).to(tl.float32) * LOG2E
        list_of = offsets
        if MASK_Q:
            list_of += head * offsets_head + start // MASK_K
        entry, count, a, b, c, d = work(list_of, listed, met, begin_q, l, MASK_Q, ROWS)
        for GUARDED in tl.static_range((MASK_Q > 0) or (q_positions is not None), 2):
            for n in range(a if GUARDED else b, d - (c - b) if GUARDED else c):
                i, listing = indices(listed, patterns, entry, count, met, n, b, c, begin_q, zero, GUARDED, MASK_Q, ROWS)
                at, seen = meets(p, j < stop, q_positions, i, begin_q, end_q, right, left)
                if seen:
                    queries = take(q_of, i, q_strides[1], begin_q, end_q, K, BLOCK_K, GUARDED)
                    product = tl.dot(keys, tl.trans(queries), input_precision="ieee")
                    s, slant = logits(product, p[:, None] - at[None, :], slope, factor, cap, SOFTCAP)
                    s = visible(s, i, low, high, listing, bits, i[None, :], j[:, None], GUARDED, MASK_Q, MASK_K)
                    s = within(q_positions, s, p[:, None] - at[None, :], right, left)
                    there = (i >= begin_q) & (i < end_q)
                    top = tl.load(tops + sums + i, mask=there, other=float("inf"))
                    weights = tl.exp2(s - top[None, :])
                    gradients = take(dout_of, i, dout_strides[1], begin_q, end_q, V, BLOCK_V, GUARDED)
                    if dv is not None:
                        own_v = tl.dot(weights.to(gradients.dtype), gradients, own_v, input_precision="ieee")
                    if dk is not None:
                        ds = tl.dot(values, tl.trans(gradients), input_precision="ieee")
                        ds = weights * (ds - tl.load(delta + sums + i, mask=there, other=0.0)[None, :])
                        if SOFTCAP:
                            ds *= slant
                        own_k = tl.dot(ds.to(queries.dtype), queries, own_k, input_precision="ieee")
    j = (start ^ zero) + tl.arange(0, COLUMNS)
    here = (j < stop)[:, None]
    batches = tl.num_programs(0) // (tiles * parts * heads_k)
    row = ((part.to(tl.int64) * batches + batch) * m + j) * heads_k + head_k
    if dk is not None:
        at = row[:, None] * K + across_k
        tl.store(dk + at, (own_k * scale).to(dk.dtype.element_ty), mask=here & (across_k < K))
    if dv is not None:
        tl.store(dv + row[:, None] * V + across_v, own_v.to(dv.dtype.element_ty), mask=here & (across_v < V))
