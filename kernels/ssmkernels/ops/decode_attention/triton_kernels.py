"""Triton kernels for attention over a cache: flash decoding (Dao et al. 2023), in two launches.

The keys that a sequence sees are split into parts. A program of ``attend`` goes through one part of one head of keys,
for all queries that share them: its rows are l queries times the query heads of a group, row i * GROUP + g, padded to
``ROWS``. ``join`` brings the parts of a row together in their order. Both learn on the GPU how long a sequence is, and
a part that begins past its end has nothing to do.

Offsets are 64-bit.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import tanh


@triton.jit
def span(length, l, left, splits, part_keys):
    """The first key that a query of the sequence sees, the number of keys from it on, and how many make a part."""
    first = tl.where(left < 0, 0, tl.minimum(tl.maximum(length - l - left, 0), length))
    seen = length - first
    size = tl.where(splits > 0, tl.cdiv(seen, tl.maximum(splits, 1)), part_keys)
    return first, seen, tl.maximum(size, 1)


@triton.jit
def add_product(sums, weights, v):
    """sums + weights v. Weights keep twice the digits of a half-precision v: the product costs less than reading v."""
    if v.dtype == tl.float32:
        return tl.dot(weights, v, sums, input_precision="ieee")
    high = weights.to(v.dtype)
    low = (weights - high.to(tl.float32)).to(v.dtype)
    return tl.dot(low, v, tl.dot(high, v, sums))


@triton.jit(do_not_specialize=["parts", "tiles", "splits", "part_keys", "left"])
def attend(
    q,
    k_cache,
    v_cache,
    lengths,
    block_table,
    slopes,
    sums,
    tops,
    totals,
    q_sequence,
    q_position,
    q_head,
    q_step,
    k_page,
    k_position,
    k_head,
    k_step,
    v_page,
    v_position,
    v_head,
    v_step,
    lengths_step,
    table_sequence,
    table_block,
    l,
    left,
    parts,
    tiles,
    splits,
    part_keys,
    scale,
    softcap,
    H_KV: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One part's weighted values, sums (s h_kv l·GROUP parts V), with greatest logits and totals of the weights."""
    task = tl.program_id(0)
    tile, task = task % tiles, task // tiles
    head, task = task % H_KV, task // H_KV
    number, sequence = task % parts, (task // parts).to(tl.int64)
    length = tl.load(lengths + sequence * lengths_step)
    first, _, size = span(length, l, left, splits, part_keys)
    begin = first + number * size
    if begin >= length:
        return
    end = tl.minimum(begin + size, length)
    r = tile * ROWS + tl.arange(0, ROWS)
    i, head_of_row, there = r // GROUP, head * GROUP + r % GROUP, r < l * GROUP
    across_k, across_v = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_V)[None, :]
    q += sequence * q_sequence + (i.to(tl.int64) * q_position + head_of_row.to(tl.int64) * q_head)[:, None]
    queries = tl.load(q + across_k.to(tl.int64) * q_step, mask=there[:, None] & (across_k < K), other=0.0)
    k_cache += head.to(tl.int64) * k_head + across_k.to(tl.int64) * k_step
    v_cache += head.to(tl.int64) * v_head + across_v.to(tl.int64) * v_step
    p = (length - l + i)[:, None]
    if slopes is not None:
        slope = tl.load(slopes + head_of_row, mask=there, other=0.0).to(tl.float32)[:, None]
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    own = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for start in range(begin, end, KEYS):
        t = start + tl.arange(0, KEYS)
        here = t < end
        if block_table is not None:
            blocks = block_table + sequence * table_sequence + (t // PAGE).to(tl.int64) * table_block
            page, within = tl.load(blocks, mask=here, other=0).to(tl.int64), (t % PAGE).to(tl.int64)
        else:
            page, within = sequence, t.to(tl.int64)
        k = tl.load(
            k_cache + (page * k_page + within * k_position)[:, None], mask=here[:, None] & (across_k < K), other=0.0
        )
        s = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        if slopes is not None:
            s -= slope * (p - t[None, :]).to(tl.float32)
        visible = here[None, :] & (t[None, :] <= p) & ((left < 0) | (t[None, :] >= p - left))
        s = tl.where(visible, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # -∞ less -∞ would be NaN
        weights, factor = tl.exp(s - base[:, None]), tl.exp(top - base)
        v = tl.load(
            v_cache + (page * v_page + within * v_position)[:, None], mask=here[:, None] & (across_v < V), other=0.0
        )
        total = total * factor + tl.sum(weights, axis=1)
        own = add_product(own * factor[:, None], weights, v)
        top = higher
    row = ((sequence * H_KV + head) * l * GROUP + r) * parts + number
    tl.store(tops + row, top, mask=there)
    tl.store(totals + row, total, mask=there)
    tl.store(sums + row[:, None] * V + across_v, own, mask=there[:, None] & (across_v < V))


@triton.jit(do_not_specialize=["parts", "splits", "part_keys", "left"])
def join(
    sums,
    tops,
    totals,
    lengths,
    sinks,
    out,
    lse,
    lengths_step,
    l,
    left,
    parts,
    splits,
    part_keys,
    H_KV: tl.constexpr,
    GROUP: tl.constexpr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The parts of one query of one head, ``PARTS`` at a time, and the sink → out (s l h V) and lse (s h l)."""
    task = tl.program_id(0).to(tl.int64)
    head, i = task % (H_KV * GROUP), task // (H_KV * GROUP) % l
    sequence = task // (H_KV * GROUP) // l
    length = tl.load(lengths + sequence * lengths_step)
    _, seen, size = span(length, l, left, splits, part_keys)
    count = tl.cdiv(seen, size)
    row = (((sequence * H_KV + head // GROUP) * l + i) * GROUP + head % GROUP) * parts
    across = tl.arange(0, BLOCK_V)[None, :]
    sink = -float("inf")
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
    top = sink
    for start in range(0, count, PARTS):
        number = start + tl.arange(0, PARTS)
        found = tl.load(tops + row + number, mask=number < count, other=-float("inf"))
        top = tl.maximum(top, tl.max(found, axis=0))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.exp(sink - base)
    own = tl.zeros((1, BLOCK_V), tl.float32)
    for start in range(0, count, PARTS):
        number = start + tl.arange(0, PARTS)
        here = number < count
        factor = tl.exp(tl.load(tops + row + number, mask=here, other=-float("inf")) - base)
        total += tl.sum(factor * tl.load(totals + row + number, mask=here, other=0.0), axis=0)
        part = tl.load(sums + (row + number)[:, None] * V + across, mask=here[:, None] & (across < V), other=0.0)
        own += tl.sum(factor[:, None] * part, axis=0)[None, :]
    blind = total == 0
    own = tl.where(blind, 0.0, own / tl.where(blind, 1.0, total))
    tl.store(out + task * V + across, own.to(out.dtype.element_ty), mask=across < V)
    if lse is not None:
        at = (sequence * H_KV * GROUP + head) * l + i
        tl.store(lse + at, tl.where(blind, -float("inf"), base + tl.log(tl.where(blind, 1.0, total))))
