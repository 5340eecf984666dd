"""Attention's gradient of queries in Triton, as the forward pass in ``triton_kernels.py``.

The weights are computed once more from the log-sum-exp. No kernel adds to what another program writes: this one has a
tile of queries and sums over keys, the one in ``triton_keys_kernels.py`` a tile of keys and sums over queries.
"""

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
    at_heads,
    indices,
    logits,
    meets,
    own_queries,
    own_side,
    take,
    visible,
    within,
    work,
)


@triton.jit(do_not_specialize=["l"])
def row_sums(
    out,
    lse,
    dout,
    dlse,
    tops,
    delta,
    l,
    H: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """delta, what the softmax takes off every gradient of a logit, and tops, lse to base 2; both (b H l).

    Where a query sees nothing its top is +∞, so that every weight comes out as 0.
    """
    tiles = tl.cdiv(l, ROWS)
    head = tl.program_id(0) // tiles % H
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    at_v = tl.arange(0, BLOCK_V)[None, :]
    mask = (i < l)[:, None] & (at_v < V)
    value = tl.load(out + (((batch * l + i) * H + head) * V)[:, None] + at_v, mask=mask, other=0.0)
    dout = at_head(dout, batch, head, at_v)
    gradient = tl.load(dout.at + i.to(tl.int64)[:, None] * dout.time, mask=mask, other=0.0)
    total = tl.sum(value.to(tl.float32) * gradient.to(tl.float32), axis=1)
    row = (batch * H + head) * l + i
    if dlse is not None:
        total -= tl.load(dlse + row, mask=i < l, other=0.0)
    top = tl.load(lse + row, mask=i < l, other=0.0)
    tl.store(tops + row, tl.where(top == -float("inf"), float("inf"), top * LOG2E), mask=i < l)
    tl.store(delta + row, total, mask=i < l)


@triton.jit(do_not_specialize=["l", "m", "tiles", "zero", "left", "right"])
def queries_backward(
    q,
    k,
    v,
    slopes,
    dout,
    tops,
    delta,
    dlse,
    dq,
    dslopes,
    sides,
    places,
    lists,
    l,
    m,
    tiles,
    zero,
    left,
    right,
    scales,
    dims: tl.constexpr,
):
    """dq (b l H K) of one tile of queries, and its part of dslopes (H, tiles of all b)."""
    MASK_Q: tl.constexpr = dims.MASK_Q
    number, head, batch, start, stop, end, begin_k, end_k = own_queries(tiles, places, sides, l, m, dims)
    if start >= stop:
        return
    q_positions, k_positions = sides.q_positions, sides.k_positions
    if q_positions is not None:
        q_positions, k_positions = q_positions + batch * l, k_positions + batch * m
    i, p, low, high, met = own_side(start, stop, end_k - end, q_positions, begin_k, end_k, left, right, dims.ROWS)
    across_k, across_v = across(dims)
    q, k, v = at_heads(q, k, v, batch, head, across_k, across_v, dims)
    dout = at_head(dout, batch, head, across_v)
    queries = take(q, i, start, stop, dims.K, dims.BLOCK_K, True)
    gradients = take(dout, i, start, stop, dims.V, dims.BLOCK_V, True)
    row = (batch * dims.H + head) * l + i
    top = tl.load(tops + row, mask=i < stop, other=float("inf"))
    own_delta = tl.load(delta + row, mask=i < stop, other=0.0)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32) * LOG2E
    own = zeros(dims.ROWS, dims.BLOCK_K)
    far, gain, far_gain = zeros(dims.ROWS), zeros(dims.ROWS), zeros(dims.ROWS)
    offsets = lists.offsets
    if MASK_Q:
        offsets += head * lists.head + start // MASK_Q
    entry, count, a, b, c, d = work(offsets, lists.listed, met, begin_k, m, dims.MASK_K, dims.COLUMNS)
    for GUARDED in tl.static_range((MASK_Q > 0) or (k_positions is not None), 2):
        for n in range(a if GUARDED else b, d - (c - b) if GUARDED else c):
            j, listing = indices(lists, entry, count, met, n, b, c, begin_k, zero, GUARDED, dims.MASK_K, dims.COLUMNS)
            at, seen = meets(p, i < stop, k_positions, j, begin_k, end_k, left, right)
            if seen:
                keys = take(k, j, begin_k, end_k, dims.K, dims.BLOCK_K, GUARDED)
                product = tl.dot(queries, tl.trans(keys), input_precision="ieee")
                distance = p[:, None] - at[None, :]
                s, slant = logits(product, distance, slope, scales, dims.SOFTCAP)
                s = visible(s, j, low, high, listing, lists.bits, i[:, None], j[None, :], GUARDED, MASK_Q, dims.MASK_K)
                s = within(k_positions, s, distance, left, right)
                weights = tl.exp2(s - top[:, None])
                values = take(v, j, begin_k, end_k, dims.V, dims.BLOCK_V, GUARDED)
                dweights = tl.dot(gradients, tl.trans(values), input_precision="ieee")
                if dslopes is not None:
                    apart = tl.abs(distance).to(tl.float32)
                    far += tl.sum(weights * apart, axis=1)
                    gain += tl.sum(weights * dweights, axis=1)
                    far_gain += tl.sum(weights * dweights * apart, axis=1)
                ds = weights * (dweights - own_delta[:, None])
                if dims.SOFTCAP:
                    ds *= slant
                own = tl.dot(ds.to(keys.dtype), keys, own, input_precision="ieee")
    i = (start ^ zero) + tl.arange(0, dims.ROWS)
    row = ((batch * l + i) * dims.H + head) * dims.K
    mask = (i < stop)[:, None] & (across_k < dims.K)
    tl.store(dq + row[:, None] + across_k, (own * scales.scale).to(dq.dtype.element_ty), mask=mask)
    if dslopes is not None:
        # Slopes may be float32 beside half precision: their gradient does without the delta that a rounded out gives
        if dlse is not None:
            gain -= tl.load(dlse + (batch * dims.H + head) * l + i, mask=i < stop, other=0.0)
        parts = tl.num_programs(0) // dims.H
        tl.store(dslopes + head.to(tl.int64) * parts + batch * tiles + number, tl.sum(gain * far - far_gain, axis=0))
