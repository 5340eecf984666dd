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

from ssmkernels.ops.attention.triton_keys_kernels import keys_backward
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
from ssmkernels.ops.attention.triton_queries_kernels import queries_backward, row_sums

__all__ = ["forward", "keys_backward", "queries_backward", "row_sums"]

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit(do_not_specialize=["l", "m", "tiles", "zero", "left", "right"])
def forward(
    q,
    k,
    v,
    slopes,
    sinks,
    out,
    lse,
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
    offsets_head,
    l,
    m,
    tiles,
    zero,
    left,
    right,
    factor,
    cap,
    H: tl.constexpr,
    GROUP: tl.constexpr,
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
    """out (b l H V) and lse (b H l) of one tile of queries."""
    number, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    number = tiles - 1 - number  # under a causal mask the longest work is at the end: begin with it
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    start, stop, _, end, begin_k, end_k = tile_of(number, owners, starts, cu_seqlens, cu_seqlens_k, l, m, MASK_Q, ROWS)
    if start >= stop:
        return
    if q_positions is not None:
        q_positions, k_positions = q_positions + batch * l, k_positions + batch * m
    i, p, low, high, met = own_side(start, stop, end_k - end, q_positions, begin_k, end_k, left, right, ROWS)
    across_k, across_v = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_V)[None, :]
    q = at_head(q, q_strides, batch, head, across_k)
    k = at_head(k, k_strides, batch, head // GROUP, across_k)
    v = at_head(v, v_strides, batch, head // GROUP, across_v)
    queries = take(q, i, q_strides[1], start, stop, K, BLOCK_K, True)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32) * LOG2E
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)  # -∞ less -∞ would be NaN
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    own = tl.zeros((ROWS, BLOCK_V), tl.float32)
    if MASK_Q:
        offsets += head * offsets_head + start // MASK_Q
    entry, count, a, b, c, d = work(offsets, listed, met, begin_k, m, MASK_K, COLUMNS)
    for GUARDED in tl.static_range((MASK_Q > 0) or (k_positions is not None), 2):
        for n in range(a if GUARDED else b, d - (c - b) if GUARDED else c):
            j, listing = indices(listed, patterns, entry, count, met, n, b, c, begin_k, zero, GUARDED, MASK_K, COLUMNS)
            at, seen = meets(p, i < stop, k_positions, j, begin_k, end_k, left, right)
            if seen:
                keys = take(k, j, k_strides[1], begin_k, end_k, K, BLOCK_K, GUARDED)
                product = tl.dot(queries, tl.trans(keys), input_precision="ieee")
                s = logits(product, p[:, None] - at[None, :], slope, factor, cap, SOFTCAP)[0]
                s = visible(s, j, low, high, listing, bits, i[:, None], j[None, :], GUARDED, MASK_Q, MASK_K)
                s = within(k_positions, s, p[:, None] - at[None, :], left, right)
                higher = tl.maximum(top, tl.max(s, axis=1))
                weights, decay = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
                total = total * decay + tl.sum(weights, axis=1)
                values = take(v, j, v_strides[1], begin_k, end_k, V, BLOCK_V, GUARDED)
                own = tl.dot(weights.to(values.dtype), values, own * decay[:, None], input_precision="ieee")
                top = higher
    i = (start ^ zero) + tl.arange(0, ROWS)
    here = i < stop
    row = (batch * H + head) * l + i
    tl.store(lse + row, (top + tl.log2(total)) * LN2, mask=here)  # -∞ where nothing was seen
    own /= tl.where(total == 0, 1.0, total)[:, None]
    row = ((batch * l + i) * H + head) * V
    tl.store(out + row[:, None] + across_v, own.to(out.dtype.element_ty), mask=here[:, None] & (across_v < V))
