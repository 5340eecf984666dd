"""Attention's Triton kernels: FlashAttention-2 (Dao 2023, arXiv 2307.08691), its forward pass here.

A program has one tile of queries of one head and goes through the tiles of keys in which these see something. First
come those that hide nothing, then those through which a border of the window or of a sequence cuts; with a block mask
all that its list names, in the list's order. Logits are to base 2. What is absent is None; offsets are 64-bit. ``zero``
is 0, which the compiler may not know: it would carry a pointer for every row of every tensor through the loops, and
through them the places of what is written after them.

``lse``, ``tops`` and ``delta`` (batch, heads, l), ``out`` and gradients (batch, position, head, width) are contiguous.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import zeros
from ssmkernels.ops.attention.triton_keys_kernels import keys_backward
from ssmkernels.ops.attention.triton_pieces import (
    LOG2E,
    across,
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
from ssmkernels.ops.attention.triton_queries_kernels import queries_backward, row_sums

__all__ = ["forward", "keys_backward", "queries_backward", "row_sums"]

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit(do_not_specialize=["l", "m", "tiles", "zero", "left", "right"])
def forward(
    q, k, v, slopes, sinks, out, lse, sides, places, lists, l, m, tiles, zero, left, right, scales, dims: tl.constexpr
):
    """out (b l H V) and lse (b H l) of one tile of queries."""
    MASK_Q: tl.constexpr = dims.MASK_Q
    _, head, batch, start, stop, end, begin_k, end_k = own_queries(tiles, places, sides, l, m, dims)
    if start >= stop:
        return
    q_positions, k_positions = sides.q_positions, sides.k_positions
    if q_positions is not None:
        q_positions, k_positions = q_positions + batch * l, k_positions + batch * m
    i, p, low, high, met = own_side(start, stop, end_k - end, q_positions, begin_k, end_k, left, right, dims.ROWS)
    across_k, across_v = across(dims)
    q, k, v = at_heads(q, k, v, batch, head, across_k, across_v, dims)
    queries = take(q, i, start, stop, dims.K, dims.BLOCK_K, True)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32) * LOG2E
    top, total = zeros(dims.ROWS) + LOWEST, zeros(dims.ROWS)  # -∞ less -∞ would be NaN
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    own = zeros(dims.ROWS, dims.BLOCK_V)
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
                s = logits(product, p[:, None] - at[None, :], slope, scales, dims.SOFTCAP)[0]
                s = visible(s, j, low, high, listing, lists.bits, i[:, None], j[None, :], GUARDED, MASK_Q, dims.MASK_K)
                s = within(k_positions, s, p[:, None] - at[None, :], left, right)
                higher = tl.maximum(top, tl.max(s, axis=1))
                weights, decay = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
                total = total * decay + tl.sum(weights, axis=1)
                values = take(v, j, begin_k, end_k, dims.V, dims.BLOCK_V, GUARDED)
                own = tl.dot(weights.to(values.dtype), values, own * decay[:, None], input_precision="ieee")
                top = higher
    i = (start ^ zero) + tl.arange(0, dims.ROWS)
    here = i < stop
    row = (batch * dims.H + head) * l + i
    tl.store(lse + row, (top + tl.log2(total)) * LN2, mask=here)  # -∞ where nothing was seen
    own /= tl.where(total == 0, 1.0, total)[:, None]
    row = ((batch * l + i) * dims.H + head) * dims.V
    tl.store(out + row[:, None] + across_v, own.to(out.dtype.element_ty), mask=here[:, None] & (across_v < dims.V))
