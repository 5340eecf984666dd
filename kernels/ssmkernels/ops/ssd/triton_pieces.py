"""Functions that the state-space dual's Triton kernels are made of.

A chunk has ``Q`` slots for tokens and belongs to one sequence: chunks begin anew at each border. The decay from token j
to token i is a power of 2 with the exponent cs_i - cs_j, where cs are sums over the chunk from its first token on. Each
sum is kept as two float32 numbers, ``high`` + ``low``. Near sums have an exact difference of their high parts, so the
exponent is as accurate as the sum of only the terms in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import softplus


@triton.jit
def place(chunk, owners, cu_seqlens, length, per_sequence, Q: tl.constexpr):
    """A chunk's batch, and where it starts and stops there. An empty chunk stops before it starts."""
    chunk = tl.cast(chunk, tl.int64)
    if cu_seqlens is not None:
        sequence = tl.load(owners + chunk).to(tl.int64)
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        start = begin + (chunk - begin // Q - sequence) * Q
        return chunk * 0, start, tl.minimum(start + Q, end)
    start = chunk % per_sequence * Q
    return chunk // per_sequence, start, tl.minimum(start + Q, length)


@triton.jit
def span(cu_seqlens, sequence, length, per_sequence, Q: tl.constexpr):
    """A sequence's batch, where it begins and ends there, and the number of its first chunk."""
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        return sequence * 0, begin, tl.load(cu_seqlens + sequence + 1).to(tl.int64), begin // Q + sequence
    return sequence, sequence * 0, sequence * 0 + length, sequence * per_sequence


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
def load_state(states, first_p, first_n, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """(BP, BN) of a state (P, N), which is contiguous; 0 outside."""
    p, n = first_p + tl.arange(0, BP), first_n + tl.arange(0, BN)
    there = (p < P)[:, None] & (n < N)[None, :]
    return tl.load(states + p[:, None] * N + n[None, :], mask=there, other=0.0)


@triton.jit
def product(a, b, total, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, whose factors are rounded to the dtype ``FACTOR`` first."""
    return tl.dot(a.to(FACTOR), b.to(FACTOR), total, input_precision=PRECISION)


@triton.jit
def decays(high, low, Q: tl.constexpr):
    """(i, j) the decay from token j to token i, 0 where j is later, from pointers to a chunk's sums."""
    i = tl.arange(0, Q)
    high, low = tl.load(high + i), tl.load(low + i)
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp2(tl.where(i[:, None] >= i[None, :], exponent, -float("inf")))


@triton.jit
def decays_to_end(high, low, Q: tl.constexpr):
    """(Q) the decay from each token to the chunk's end, from pointers to its sums."""
    i = tl.arange(0, Q)
    exponent = (tl.load(high + Q - 1) - tl.load(high + i)) + (tl.load(low + Q - 1) - tl.load(low + i))
    return tl.exp2(exponent)


@triton.jit
def step_size(raw, low, high, SOFTPLUS: tl.constexpr):
    """Δ of dt + dt_bias."""
    if SOFTPLUS:
        raw = softplus(raw)
    raw = tl.where(raw < low, low, raw)  # NaN stays
    return tl.where(raw > high, high, raw)
