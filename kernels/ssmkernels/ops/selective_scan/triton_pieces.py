"""Functions that the selective scan's Triton kernels are made of."""

# mypy: disable-error-code="assignment"
# (tuples of registers grow in unrolled loops)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import softplus


@triton.jit
def extent(sequence, cu_seqlens, length, CHUNK: tl.constexpr):
    """A sequence's batch, the time where it starts there, its length, and the number of its first chunk."""
    sequence = tl.cast(sequence, tl.int64)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        return sequence * 0, start, end - start, start // CHUNK + sequence
    steps = sequence * 0 + length
    return sequence, sequence * 0, steps, sequence * ((steps + CHUNK - 1) // CHUNK)


@triton.jit
def along(x, strides, batch, start, channel):
    """Pointers to channels of x where a sequence starts; strides of (batch, time, d)."""
    return x + (batch * strides[0] + start * strides[1] + channel * strides[2])


@triton.jit
def along_map(x, strides, batch, start, group, state, at, FIXED: tl.constexpr):
    """Pointers to a group's states of B or C where a sequence starts; to ``at`` where they are fixed."""
    if FIXED:
        return x + at
    else:  # noqa: RET505 (the compiler wants to see it)
        return x + (batch * strides[0] + start * strides[1] + group * strides[2] + state.to(tl.int64) * strides[3])


@triton.jit
def weights(A2, D, bias, at, channel, live, here, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """A2 (BLOCK_D, N), D and the bias (BLOCK_D), 0 where they are absent."""
    skip, offset = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    if D is not None:
        skip += tl.load(D + channel, mask=here, other=0.0)
    if bias is not None:
        offset += tl.load(bias + channel, mask=here, other=0.0)
    return tl.load(A2 + at, mask=live, other=0.0), skip, offset


@triton.jit
def rows(x, x_time, here, first, steps, T: tl.constexpr, WIDE: tl.constexpr):
    """``T`` rows (BLOCK_D) from step ``first`` on; 0 beyond the end."""
    found = ()
    x += tl.cast(first, tl.int64) * x_time
    for i in tl.static_range(T):
        found = found + (tl.load(x, mask=here & (first + i < steps), other=0.0).to(WIDE),)
        x += x_time
    return found


@triton.jit
def maps(x, x_time, there, first, steps, T: tl.constexpr, FIXED: tl.constexpr, WIDE: tl.constexpr):
    """``T`` rows (1, N) of B or C from step ``first`` on, 0 beyond the end; if fixed, ``T`` times (BLOCK_D, N)."""
    found = ()
    if FIXED:
        same = tl.load(x, mask=there, other=0.0).to(WIDE)
        for _ in tl.static_range(T):
            found = found + (same,)
    else:
        x += tl.cast(first, tl.int64) * x_time
        for i in tl.static_range(T):
            found = found + (tl.load(x, mask=there & (first + i < steps), other=0.0).to(WIDE)[None, :],)
            x += x_time
    return found


@triton.jit
def step_sizes(raw, bias, first, steps, T: tl.constexpr, SOFTPLUS: tl.constexpr):
    """What Δ is computed from, and Δ, both ``T`` times (BLOCK_D)."""
    before, found = (), ()
    for i in tl.static_range(T):
        dt = raw[i] + bias
        before = before + (dt,)
        if SOFTPLUS:
            dt = softplus(dt)
        found = found + (tl.where(first + i < steps, dt, 0.0),)
    return before, found
