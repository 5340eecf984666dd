"""Triton kernels for attention to selected blocks.

``attend`` and ``queries_backward``: a program has one query, its rows the heads that share a selection, padded to
``ROWS``, and goes through the blocks that the query selected (arXiv 2502.11089, section 3.4). ``keys_backward``: a
program has a part of one block, and goes through the queries that selected it, ``QUERIES`` at a time. No sum is shared
among programs.

All tensors are contiguous: of queries (b·g l GROUPS d), of keys (b·h_kv m d). Offsets are 64-bit.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import zeros

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b, sums):
    """sums + a b, in full precision of float32."""
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def precise(a, b, sums):
    """The same for weights a in float32, of which two parts in half precision keep the digits."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, sums, input_precision="ieee")
    high = a.to(b.dtype)
    low = (a - high.to(tl.float32)).to(b.dtype)
    return tl.dot(low, b, tl.dot(high, b, sums))


@triton.jit
def rows_of(x, row, i, l, lane, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a query, (ROWS BLOCK)."""
    at = tl.arange(0, BLOCK)
    return tl.load(
        x + ((row * l + i) * GROUPS + lane[:, None]) * D + at, mask=(lane < GROUPS)[:, None] & (at < D), other=0.0
    )


@triton.jit
def columns_of(x, key_row, m, keys, seen, D: tl.constexpr, BLOCK: tl.constexpr):
    """Keys or values at these places, (KEYS BLOCK); 0 where they are not seen, whatever they hold."""
    at = tl.arange(0, BLOCK)
    return tl.load(x + (key_row * m + keys[:, None]) * D + at, mask=seen[:, None] & (at < D), other=0.0)


@triton.jit
def query_of(l, m, dims: tl.constexpr):
    """A program's query, its row among those of all sequences and selections, that of its keys, and its place there."""
    task = tl.program_id(0).to(tl.int64)
    i, row = task % l, task // l
    return i, row, row // dims.G * dims.H_KV + row % dims.G // (dims.G // dims.H_KV), i + m - l


@triton.jit
def keys_of(selected, place, dims: tl.constexpr):
    """The first key of a selected block, and the first that the query at ``place`` does not see; none of block -1."""
    block = tl.load(selected).to(tl.int64)
    first = block * dims.SIZE
    return first, tl.where(block >= 0, tl.minimum(first + dims.SIZE, place + 1), first)


@triton.jit(do_not_specialize=["l", "m", "n"])
def attend(q, k, v, blocks, out, lse, l, m, n, scale, dims: tl.constexpr):
    """out (b·g l GROUPS V) and lse (b·g l GROUPS)."""
    i, row, key_row, place = query_of(l, m, dims)
    lane, step, wide = tl.arange(0, dims.ROWS), tl.arange(0, dims.KEYS), tl.arange(0, dims.BLOCK_V)
    q_i = rows_of(q, row, i, l, lane, dims.GROUPS, dims.K, dims.BLOCK_K)
    top = zeros(dims.ROWS) - 3.4e38  # and not -∞, as -∞ less -∞ is NaN
    total = zeros(dims.ROWS)
    mean = zeros(dims.ROWS, dims.BLOCK_V)
    for j in range(n):
        first, end = keys_of(blocks + (row * l + i) * n + j, place, dims)
        for start in range(first, end, dims.KEYS):
            seen = start + step < end
            k_j = columns_of(k, key_row, m, start + step, seen, dims.K, dims.BLOCK_K)
            s = product(q_i, tl.trans(k_j), zeros(dims.ROWS, dims.KEYS)) * (scale * LOG2E)
            s = tl.where(seen, s, float("-inf"))
            now = tl.maximum(top, tl.max(s, 1))
            fades = tl.exp2(top - now)
            p = tl.exp2(s - now[:, None])
            total = total * fades + tl.sum(p, 1)
            mean = precise(
                p, columns_of(v, key_row, m, start + step, seen, dims.V, dims.BLOCK_V), mean * fades[:, None]
            )
            top = now
    blind = total == 0
    mean = mean / tl.where(blind, 1, total)[:, None]
    sums = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1, total))) * LN2)
    base = (row * l + i) * dims.GROUPS + lane
    tl.store(out + base[:, None] * dims.V + wide, mean, mask=(lane < dims.GROUPS)[:, None] & (wide < dims.V))
    tl.store(lse + base, sums, mask=lane < dims.GROUPS)


@triton.jit(do_not_specialize=["l", "m", "n"])
def queries_backward(q, k, v, blocks, dout, lse, delta, dq, l, m, n, scale, dims: tl.constexpr):
    """dq (b·g l GROUPS K)."""
    i, row, key_row, place = query_of(l, m, dims)
    lane, step, wide = tl.arange(0, dims.ROWS), tl.arange(0, dims.KEYS), tl.arange(0, dims.BLOCK_K)
    base = (row * l + i) * dims.GROUPS + lane
    q_i = rows_of(q, row, i, l, lane, dims.GROUPS, dims.K, dims.BLOCK_K)
    do_i = rows_of(dout, row, i, l, lane, dims.GROUPS, dims.V, dims.BLOCK_V)
    lse_i = tl.load(lse + base, mask=lane < dims.GROUPS, other=0.0) * LOG2E
    delta_i = tl.load(delta + base, mask=lane < dims.GROUPS, other=0.0)
    sums = zeros(dims.ROWS, dims.BLOCK_K)
    for j in range(n):
        first, end = keys_of(blocks + (row * l + i) * n + j, place, dims)
        for start in range(first, end, dims.KEYS):
            seen = start + step < end
            k_j = columns_of(k, key_row, m, start + step, seen, dims.K, dims.BLOCK_K)
            zero = zeros(dims.ROWS, dims.KEYS)
            s = product(q_i, tl.trans(k_j), zero) * (scale * LOG2E)
            p = tl.where(seen, tl.exp2(s - lse_i[:, None]), 0.0)
            dp = product(do_i, tl.trans(columns_of(v, key_row, m, start + step, seen, dims.V, dims.BLOCK_V)), zero)
            sums = precise(p * (dp - delta_i[:, None]), k_j, sums)
    tl.store(dq + base[:, None] * dims.K + wide, sums * scale, mask=(lane < dims.GROUPS)[:, None] & (wide < dims.K))


@triton.jit(do_not_specialize=["l", "m", "count", "parts"])
def keys_backward(q, k, v, offsets, queries, dout, lse, delta, dk, dv, l, m, count, parts, scale, dims: tl.constexpr):
    """dk and dv (b·h_kv m d) of ``KEYS`` keys of a block, whose queries lie between two of ``offsets``."""
    task = tl.program_id(0).to(tl.int64)
    part, task = task % parts, task // parts
    block, key_row = task % count, task // count
    end = tl.minimum((block + 1) * dims.SIZE, m)
    keys = block * dims.SIZE + part * dims.KEYS + tl.arange(0, dims.KEYS)
    there = keys < end
    k_j = columns_of(k, key_row, m, keys, there, dims.K, dims.BLOCK_K)
    v_j = columns_of(v, key_row, m, keys, there, dims.V, dims.BLOCK_V)
    dk_j, dv_j = zeros(dims.KEYS, dims.BLOCK_K), zeros(dims.KEYS, dims.BLOCK_V)
    number, at_k, at_v = tl.arange(0, dims.QUERIES * dims.LANES), tl.arange(0, dims.BLOCK_K), tl.arange(0, dims.BLOCK_V)
    lane = number % dims.LANES
    for head in range(dims.G // dims.H_KV):
        row = key_row // dims.H_KV * dims.G + key_row % dims.H_KV * (dims.G // dims.H_KV) + head
        begin, stop = tl.load(offsets + row * count + block), tl.load(offsets + row * count + block + 1)
        for start in range(begin, stop, dims.QUERIES):
            place_in_list = start + number // dims.LANES
            listed = (place_in_list < stop) & (lane < dims.GROUPS)
            i = tl.load(queries + place_in_list, mask=listed, other=0)
            base = (row * l + i) * dims.GROUPS + lane
            q_i = tl.load(q + base[:, None] * dims.K + at_k, mask=listed[:, None] & (at_k < dims.K), other=0.0)
            do_i = tl.load(dout + base[:, None] * dims.V + at_v, mask=listed[:, None] & (at_v < dims.V), other=0.0)
            lse_i = tl.load(lse + base, mask=listed, other=0.0) * LOG2E
            delta_i = tl.load(delta + base, mask=listed, other=0.0)
            zero = zeros(dims.KEYS, dims.QUERIES * dims.LANES)
            s = product(k_j, tl.trans(q_i), zero) * (scale * LOG2E)
            seen = there[:, None] & listed & (keys[:, None] <= i + m - l)
            p = tl.where(seen, tl.exp2(s - lse_i), 0.0)
            dv_j = precise(p, do_i, dv_j)
            dp = product(v_j, tl.trans(do_i), zero)
            dk_j = precise(tl.where(seen, p * (dp - delta_i), 0.0), q_i, dk_j)
    base = key_row * m + keys
    tl.store(dk + base[:, None] * dims.K + at_k, dk_j * scale, mask=there[:, None] & (at_k < dims.K))
    tl.store(dv + base[:, None] * dims.V + at_v, dv_j, mask=there[:, None] & (at_v < dims.V))
