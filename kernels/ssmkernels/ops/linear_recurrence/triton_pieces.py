"""Functions that the linear recurrence's Triton kernels are made of."""

# mypy: disable-error-code="assignment"
# (tuples of registers grow in unrolled loops)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of(pid, d, BLOCK_D: tl.constexpr):
    """A program's chunk or sequence, and its block of channels; blocks of one follow on one another."""
    pid, blocks = pid.to(tl.int64), tl.cdiv(d, BLOCK_D)
    return pid // blocks, pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def extent(pid, cu_seqlens, owners, length, per_sequence, d, SPAN: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program's chunk, sequence and batch; the time where it starts, its steps; whether it is a sequence's first and
    last; and the channels. A chunk without steps is the last only of an empty sequence."""
    chunk, channel = block_of(pid, d, BLOCK_D)
    if cu_seqlens is not None:
        sequence = tl.load(owners + chunk).to(tl.int64)
        batch = sequence * 0
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        start = begin + (chunk - begin // SPAN - sequence) * SPAN
    else:
        sequence = chunk // per_sequence
        batch = sequence
        begin, end, start = batch * 0, batch * 0 + length, chunk % per_sequence * SPAN
    steps = tl.maximum(tl.minimum(start + SPAN, end) - start, 0)
    first = start == begin
    last = ((start < end) | (first & (begin == end))) & (end <= start + SPAN)
    return chunk, sequence, batch, start, steps, first, last, channel


@triton.jit
def rows(x, x_time, here, first, steps, other, T: tl.constexpr, WIDE: tl.constexpr):
    """``T`` rows (BLOCK_D) from step ``first`` on; ``other`` before step 0 and beyond the end."""
    found = ()
    for i in tl.static_range(T):
        t = tl.cast(first, tl.int64) + i
        found = found + (tl.load(x + t * x_time, mask=here & (t >= 0) & (t < steps), other=other).to(WIDE),)
    return found


@triton.jit
def times(a_real, a_imaginary, real, imaginary, COMPLEX: tl.constexpr, COMPLEX_A: tl.constexpr):
    """a times a state, by parts; those that are not there are as they came."""
    if COMPLEX_A:
        return a_real * real - a_imaginary * imaginary, a_real * imaginary + a_imaginary * real
    if COMPLEX:
        return a_real * real, a_real * imaginary
    return a_real * real, imaginary


@triton.jit
def finite(x):
    """Within the finite numbers, so that a product with a state of 0 is 0."""
    most: tl.constexpr = 1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38
    return tl.where(x > most, most, tl.where(x < -most, -most, x))
