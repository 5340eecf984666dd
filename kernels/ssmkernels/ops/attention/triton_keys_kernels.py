"""Attention's gradients of keys and values in Triton: ``triton_queries_kernels.py`` with the sides exchanged."""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import zeros
from ssmkernels.ops.attention.triton_pieces import (
    LOG2E,
    across,
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
    sides,
    places,
    lists,
    l,
    m,
    tiles,
    parts,
    zero,
    left,
    right,
    scales,
    dims: tl.constexpr,
):
    """One tile of keys: dk (parts b m H/GROUP K) and dv (parts b m H/GROUP V), each part over HEADS of a group's heads.

    One of them may be None. Tiles are transposed: a row for each key, a column for each query.
    """
    MASK_Q: tl.constexpr = dims.MASK_Q
    task = tl.program_id(0)
    number, task = task % tiles, task // tiles
    part, task = task % parts, task // parts
    heads_k: tl.constexpr = dims.H // dims.GROUP
    head_k, batch = task % heads_k, (task // heads_k).to(tl.int64)
    start, stop, _, end, begin_q, end_q = tile_of(
        number, places, sides.cu_seqlens_k, sides.cu_seqlens, m, l, dims.MASK_K, dims.COLUMNS
    )
    if start >= stop:
        return
    q_positions, k_positions = sides.q_positions, sides.k_positions
    if q_positions is not None:
        q_positions, k_positions = q_positions + batch * l, k_positions + batch * m
    j, p, low, high, met = own_side(start, stop, end_q - end, k_positions, begin_q, end_q, right, left, dims.COLUMNS)
    across_k, across_v = across(dims)
    k = at_head(k, batch, head_k, across_k)
    v = at_head(v, batch, head_k, across_v)
    keys = take(k, j, start, stop, dims.K, dims.BLOCK_K, True)
    if dk is not None:
        values = take(v, j, start, stop, dims.V, dims.BLOCK_V, True)
        own_k = zeros(dims.COLUMNS, dims.BLOCK_K)
    if dv is not None:
        own_v = zeros(dims.COLUMNS, dims.BLOCK_V)
    # What is the same for all heads is not carried in registers through the loops over queries
    for g in tl.range(part * dims.HEADS, tl.minimum(part * dims.HEADS + dims.HEADS, dims.GROUP), disable_licm=True):
        head = head_k * dims.GROUP + g
        q_of, dout_of = at_head(q, batch, head, across_k), at_head(dout, batch, head, across_v)
        sums = (batch * dims.H + head) * l
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + head).to(tl.float32) * LOG2E
        offsets = lists.offsets
        if MASK_Q:
            offsets += head * lists.head + start // dims.MASK_K
        entry, count, a, b, c, d = work(offsets, lists.listed, met, begin_q, l, MASK_Q, dims.ROWS)
        for GUARDED in tl.static_range((MASK_Q > 0) or (q_positions is not None), 2):
            for n in range(a if GUARDED else b, d - (c - b) if GUARDED else c):
                i, listing = indices(lists, entry, count, met, n, b, c, begin_q, zero, GUARDED, MASK_Q, dims.ROWS)
                at, seen = meets(p, j < stop, q_positions, i, begin_q, end_q, right, left)
                if seen:
                    queries = take(q_of, i, begin_q, end_q, dims.K, dims.BLOCK_K, GUARDED)
                    product = tl.dot(keys, tl.trans(queries), input_precision="ieee")
                    s, slant = logits(product, p[:, None] - at[None, :], slope, scales, dims.SOFTCAP)
                    s = visible(
                        s, i, low, high, listing, lists.bits, i[None, :], j[:, None], GUARDED, MASK_Q, dims.MASK_K
                    )
                    s = within(q_positions, s, p[:, None] - at[None, :], right, left)
                    there = (i >= begin_q) & (i < end_q)
                    top = tl.load(tops + sums + i, mask=there, other=float("inf"))
                    weights = tl.exp2(s - top[None, :])
                    gradients = take(dout_of, i, begin_q, end_q, dims.V, dims.BLOCK_V, GUARDED)
                    if dv is not None:
                        own_v = tl.dot(weights.to(gradients.dtype), gradients, own_v, input_precision="ieee")
                    if dk is not None:
                        ds = tl.dot(values, tl.trans(gradients), input_precision="ieee")
                        ds = weights * (ds - tl.load(delta + sums + i, mask=there, other=0.0)[None, :])
                        if dims.SOFTCAP:
                            ds *= slant
                        own_k = tl.dot(ds.to(queries.dtype), queries, own_k, input_precision="ieee")
    j = (start ^ zero) + tl.arange(0, dims.COLUMNS)
    here = (j < stop)[:, None]
    batches = tl.num_programs(0) // (tiles * parts * heads_k)
    row = ((part.to(tl.int64) * batches + batch) * m + j) * heads_k + head_k
    if dk is not None:
        at = row[:, None] * dims.K + across_k
        tl.store(dk + at, (own_k * scales.scale).to(dk.dtype.element_ty), mask=here & (across_k < dims.K))
    if dv is not None:
        tl.store(dv + row[:, None] * dims.V + across_v, own_v.to(dv.dtype.element_ty), mask=here & (across_v < dims.V))
