"""Functions that the state-space dual's Triton kernels are made of.

A chunk has ``Q`` slots for tokens and belongs to one sequence: chunks begin anew at each border. The decay from token j
to token i is a power of 2 with the exponent cs_i - cs_j, where cs are sums over the chunk from its first token on. Each
sum is kept as two float32 numbers, ``high`` + ``low``. Near sums have an exact difference of their high parts, so the
exponent is as accurate as the sum of only the terms in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import softplus, zeros


@triton.jit
def place(packing, length, chunk, Q: tl.constexpr):
    """A chunk's batch, and where it starts and stops there. An empty chunk stops before it starts."""
    chunk = tl.cast(chunk, tl.int64)
    if packing is not None:
        sequence = tl.load(packing.owners + chunk).to(tl.int64)
        begin = tl.load(packing.cu_seqlens + sequence).to(tl.int64)
        end = tl.load(packing.cu_seqlens + sequence + 1).to(tl.int64)
        start = begin + (chunk - begin // Q - sequence) * Q
        return chunk * 0, start, tl.minimum(start + Q, end)
    per_sequence = (length + Q - 1) // Q
    start = chunk % per_sequence * Q
    return chunk // per_sequence, start, tl.minimum(start + Q, length)


@triton.jit
def span(packing, length, sequence, Q: tl.constexpr):
    """A sequence's batch, where it begins and ends there, and the number of its first chunk."""
    if packing is not None:
        begin = tl.load(packing.cu_seqlens + sequence).to(tl.int64)
        end = tl.load(packing.cu_seqlens + sequence + 1).to(tl.int64)
        return sequence * 0, begin, end, begin // Q + sequence
    return sequence, sequence * 0, sequence * 0 + length, sequence * ((length + Q - 1) // Q)


@triton.jit
def chunks_of(packing, length, sequence, Q: tl.constexpr):
    """The number of a sequence's first chunk, and how many it has."""
    if packing is not None:
        begin = tl.load(packing.cu_seqlens + sequence).to(tl.int64)
        end = tl.load(packing.cu_seqlens + sequence + 1).to(tl.int64)
        return begin // Q + sequence, (end - begin + Q - 1) // Q
    per_sequence = (length + Q - 1) // Q
    return sequence * per_sequence, sequence * 0 + per_sequence


@triton.jit
def load_tile(x, rows, row_stride, last, first, across_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) of x from column ``first`` on; 0 from row ``last`` and from column ``SIZE`` on."""
    column = first + tl.arange(0, BLOCK)
    at = x + rows.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * across_stride
    there = (rows < last)[:, None]
    if SIZE % BLOCK == 0:
        return tl.load(at, mask=there, other=0.0)
    return tl.load(at, mask=there & (column < SIZE)[None, :], other=0.0)


@triton.jit
def load_rows(x, time, stop, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens, BLOCK) of one head of x from channel ``first`` on; 0 from token ``stop`` and channel ``SIZE`` on."""
    return load_tile(x.at, time, x.time, stop, first, x.step, SIZE, BLOCK)


@triton.jit
def store_rows(x, batch, time, stop, head, channel, rows, length, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Rows (tokens, channels) of a chunk into one head of x, contiguous (b l HEADS SIZE)."""
    at = x + ((batch * length + time) * HEADS + head)[:, None] * SIZE + channel[None, :]
    tl.store(at, rows.to(x.dtype.element_ty), mask=(time < stop)[:, None] & (channel < SIZE)[None, :])


@triton.jit
def head_tile(task, packing, length, dims: tl.constexpr):
    """What a program has that takes some channels of one head of a chunk: its number among these is ``task``.

    Returns:
        first, task, head, chunk: its first channel, the number of its head among those of all chunks, and of these.
        batch, start, stop: where the chunk lies, as :func:`place`.
    """
    tiles: tl.constexpr = (dims.P + dims.BLOCK_P - 1) // dims.BLOCK_P
    first, task = task % tiles * dims.BLOCK_P, task // tiles
    head, chunk = task % dims.H, task // dims.H
    batch, start, stop = place(packing, length, chunk, dims.Q)
    return first, task, head, chunk, batch, start, stop


@triton.jit
def group_part(line, packing, length, dims: tl.constexpr, HEADS: tl.constexpr):
    """What a program has that sums over some heads of a group in a chunk: its number among these is ``line``.

    Returns:
        part, of_group, group, chunk: of the group, the number of it among those of all chunks, and of these.
        batch, start, stop: where the chunk lies, as :func:`place`.
    """
    parts: tl.constexpr = (dims.GROUP + HEADS - 1) // HEADS
    groups: tl.constexpr = dims.H // dims.GROUP
    part, of_group = line % parts, line // parts
    group, chunk = of_group % groups, of_group // groups
    batch, start, stop = place(packing, length, chunk, dims.Q)
    return part, of_group, group, chunk, batch, start, stop


@triton.jit
def load_inputs(x, time, stop, first, dims: tl.constexpr):
    """(tokens, BLOCK_P) of one head's inputs from channel ``first`` on; 0 from token ``stop`` on."""
    return load_rows(x, time, stop, first, dims.P, dims.BLOCK_P)


@triton.jit
def load_map(x, time, stop, first, dims: tl.constexpr):
    """(tokens, BLOCK_N) of one group's map from state ``first`` on; 0 from token ``stop`` on."""
    return load_rows(x, time, stop, first, dims.N, dims.BLOCK_N)


@triton.jit
def load_state(states, task, first_p, first_n, dims: tl.constexpr):
    """(BLOCK_P, BLOCK_N) of one of contiguous states (P, N); 0 outside."""
    p, n = first_p + tl.arange(0, dims.BLOCK_P), first_n + tl.arange(0, dims.BLOCK_N)
    there = (p < dims.P)[:, None] & (n < dims.N)[None, :]
    return tl.load(states + task * dims.P * dims.N + p[:, None] * dims.N + n[None, :], mask=there, other=0.0)


@triton.jit
def from_states(maps, states, task, time, stop, first_p, dims: tl.constexpr):
    """(Q, BLOCK_P) a group's maps of a chunk times a head's state ``task``."""
    total = zeros(dims.Q, dims.BLOCK_P)
    for first_n in range(0, dims.N, dims.BLOCK_N):
        rows = load_map(maps, time, stop, first_n, dims)
        total = product(rows, tl.trans(load_state(states, task, first_p, first_n, dims)), total, dims)
    return total


@triton.jit
def square_at(x, task, Q: tl.constexpr):
    """(i, j) pointers to one of contiguous squares (Q, Q): numbers of the pairs of tokens of a chunk."""
    slot = tl.arange(0, Q)
    return x + task * Q * Q + slot[:, None] * Q + slot[None, :]


@triton.jit
def turned_at(x, task, Q: tl.constexpr):
    """(j, i) as :func:`square_at`."""
    slot = tl.arange(0, Q)
    return x + task * Q * Q + slot[None, :] * Q + slot[:, None]


@triton.jit
def product(a, b, total, dims: tl.constexpr):
    """total + a b, whose factors are rounded to the dtype ``FACTOR`` first."""
    return tl.dot(a.to(dims.FACTOR), b.to(dims.FACTOR), total, input_precision=dims.PRECISION)


@triton.jit
def decays(steps, task, Q: tl.constexpr):
    """(i, j) the decay from token j to token i of the chunk of a head, 0 where j is later."""
    i = tl.arange(0, Q)
    high, low = tl.load(steps.high + task * Q + i), tl.load(steps.low + task * Q + i)
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp2(tl.where(i[:, None] >= i[None, :], exponent, -float("inf")))


@triton.jit
def decays_to_end(steps, task, Q: tl.constexpr):
    """(Q) the decay from each token to the chunk's end."""
    i = tl.arange(0, Q)
    high, low = steps.high + task * Q, steps.low + task * Q
    return tl.exp2((tl.load(high + Q - 1) - tl.load(high + i)) + (tl.load(low + Q - 1) - tl.load(low + i)))


@triton.jit
def decays_from_start(steps, task, Q: tl.constexpr):
    """(Q) the decay from the chunk's start to each token."""
    return tl.exp2(tl.load(steps.high + task * Q + tl.arange(0, Q)))


@triton.jit
def sizes_of(steps, task, Q: tl.constexpr):
    """(Q) the tokens' step sizes."""
    return tl.load(steps.delta + task * Q + tl.arange(0, Q))


@triton.jit
def step_size(raw, low, high, SOFTPLUS: tl.constexpr):
    """Δ of dt + dt_bias."""
    if SOFTPLUS:
        raw = softplus(raw)
    raw = tl.where(raw < low, low, raw)  # NaN stays
    return tl.where(raw > high, high, raw)
