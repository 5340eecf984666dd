"""The linear recurrence's Triton kernels.

A program holds the states of ``BLOCK_D`` channels in registers and walks one sequence, ``T`` steps at a time: the
inputs of all ``T`` are loaded before any of them is used. Steps beyond a sequence's end have a = 1 and b = 0.

Complex tensors come as real ones of twice as many numbers, real and imaginary parts by turns; strides count numbers.
With LOG, a holds logarithms; of complex ones the exponentials, as sine and cosine would spill registers. What is
absent is None, offsets are 64-bit, and all that is written is contiguous.
"""

# mypy: disable-error-code="assignment"
# (tuples of registers grow in unrolled loops)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extent(pid, cu_seqlens, length, d_blocks, BLOCK_D: tl.constexpr):
    """A program's sequence, the batch and the time where it starts, its length, and the channels."""
    pid = pid.to(tl.int64)
    sequence, channel = pid // d_blocks, pid % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        return sequence, sequence * 0, start, end - start, channel
    return sequence, sequence, sequence * 0, sequence * 0 + length, channel


@triton.jit
def rows(x, x_time, here, first, steps, other, T: tl.constexpr, WIDE: tl.constexpr):
    """``T`` rows (BLOCK_D) from step ``first`` on; ``other`` before step 0 and beyond the end."""
    found = ()
    for i in tl.static_range(T):
        t = tl.cast(first, tl.int64) + i
        found = found + (tl.load(x + t * x_time, mask=here & (t >= 0) & (t < steps), other=other).to(WIDE),)
    return found


@triton.jit(do_not_specialize=["length", "d_blocks"])
def forward(
    a,
    b,
    initial,
    cu_seqlens,
    h,
    states,
    final,
    a_batch,
    a_time,
    a_d,
    b_batch,
    b_time,
    b_d,
    length,
    d_blocks,
    d,
    COMPLEX: tl.constexpr,
    COMPLEX_A: tl.constexpr,
    LOG: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h, the final state, and where it is wanted every state in the precision of sums."""
    WIDE: tl.constexpr = final.dtype.element_ty
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    sequence, batch, start, steps, channel = extent(tl.program_id(0), cu_seqlens, length, d_blocks, BLOCK_D)
    here = channel < d
    a += batch * a_batch + start * a_time + channel * a_d
    b += batch * b_batch + start * b_time + channel * b_d
    out = ((batch * length + start) * d + channel) * PARTS
    at = (sequence * d + channel) * PARTS
    real, imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    if initial is not None:
        real += tl.load(initial + at, mask=here, other=0.0)
        if COMPLEX:
            imaginary += tl.load(initial + at + 1, mask=here, other=0.0)
    for first in range(0, steps, T):
        a_real = rows(a, a_time, here, first, steps, 0.0 if LOG and not COMPLEX_A else 1.0, T, WIDE)
        b_real = rows(b, b_time, here, first, steps, 0.0, T, WIDE)
        if COMPLEX:
            b_imaginary = rows(b + 1, b_time, here, first, steps, 0.0, T, WIDE)
        if COMPLEX_A:
            a_imaginary = rows(a + 1, a_time, here, first, steps, 0.0, T, WIDE)
        for i in tl.static_range(T):
            alpha = a_real[i]
            if COMPLEX_A:
                beta = a_imaginary[i]
                real, imaginary = (
                    alpha * real - beta * imaginary + b_real[i],
                    alpha * imaginary + beta * real + b_imaginary[i],
                )
            else:
                if LOG:
                    alpha = tl.exp(alpha)
                real = alpha * real + b_real[i]
                if COMPLEX:
                    imaginary = alpha * imaginary + b_imaginary[i]
            inside = here & (first + i < steps)
            to = out + (tl.cast(first, tl.int64) + i) * d * PARTS
            tl.store(h + to, real, mask=inside)
            if states is not None:
                tl.store(states + to, real, mask=inside)
            if COMPLEX:
                tl.store(h + to + 1, imaginary, mask=inside)
    tl.store(final + at, real, mask=here)
    if COMPLEX:
        tl.store(final + at + 1, imaginary, mask=here)


@triton.jit(do_not_specialize=["length", "d_blocks"])
def backward(
    a,
    states,
    initial,
    cu_seqlens,
    dh,
    dfinal,
    da,
    db,
    dinitial,
    a_batch,
    a_time,
    a_d,
    dh_batch,
    dh_time,
    dh_d,
    length,
    d_blocks,
    d,
    COMPLEX: tl.constexpr,
    COMPLEX_A: tl.constexpr,
    LOG: tl.constexpr,
    FIXED: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With g_t = dh_t + conj(a_{t+1}) g_{t+1}: db_t = g_t, and da_t = g_t conj(h_{t-1}), times conj(a_t) for log a.

    Of a fixed decay, da is the sum over each sequence.
    """
    WIDE: tl.constexpr = dinitial.dtype.element_ty
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    PARTS_A: tl.constexpr = 2 if COMPLEX_A else 1
    sequence, batch, start, steps, channel = extent(tl.program_id(0), cu_seqlens, length, d_blocks, BLOCK_D)
    here = channel < d
    a += batch * a_batch + start * a_time + channel * a_d
    dh += batch * dh_batch + start * dh_time + channel * dh_d
    out = (batch * length + start) * d + channel
    states += out * PARTS
    at = sequence * d + channel
    real, imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    start_real, start_imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    sum_real, sum_imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    if dfinal is not None:
        real += tl.load(dfinal + at * PARTS, mask=here, other=0.0)
        if COMPLEX:
            imaginary += tl.load(dfinal + at * PARTS + 1, mask=here, other=0.0)
    if initial is not None:
        start_real += tl.load(initial + at * PARTS, mask=here, other=0.0)
        if COMPLEX:
            start_imaginary += tl.load(initial + at * PARTS + 1, mask=here, other=0.0)
    chunks = (steps + T - 1) // T
    for chunk in range(chunks):
        first = (chunks - 1 - chunk) * T
        a_real = rows(a, a_time, here, first, steps, 0.0 if LOG and not COMPLEX_A else 1.0, T, WIDE)
        d_real = rows(dh, dh_time, here, first, steps, 0.0, T, WIDE)
        h_real = rows(states, d * PARTS, here, first - 1, steps, 0.0, T, WIDE)
        if COMPLEX:
            d_imaginary = rows(dh + 1, dh_time, here, first, steps, 0.0, T, WIDE)
            h_imaginary = rows(states + 1, d * PARTS, here, first - 1, steps, 0.0, T, WIDE)
        if COMPLEX_A:
            a_imaginary = rows(a + 1, a_time, here, first, steps, 0.0, T, WIDE)
        for i in tl.static_range(T - 1, -1, -1):
            t = tl.cast(first, tl.int64) + i
            inside = here & (t < steps)
            alpha = a_real[i]
            real += d_real[i]
            h_r = tl.where(t == 0, start_real, h_real[i])
            slope_real = real * h_r
            if COMPLEX:
                imaginary += d_imaginary[i]
                h_i = tl.where(t == 0, start_imaginary, h_imaginary[i])
                slope_real += imaginary * h_i
            tl.store(db + (out + t * d) * PARTS, real, mask=inside)
            if COMPLEX:
                tl.store(db + (out + t * d) * PARTS + 1, imaginary, mask=inside)
            if COMPLEX_A:
                beta = a_imaginary[i]
                slope_imaginary = imaginary * h_r - real * h_i
                if LOG:
                    slope_real, slope_imaginary = (
                        slope_real * alpha + slope_imaginary * beta,
                        slope_imaginary * alpha - slope_real * beta,
                    )
                real, imaginary = alpha * real + beta * imaginary, alpha * imaginary - beta * real
            else:
                if LOG:
                    alpha = tl.exp(alpha)
                    slope_real = slope_real * alpha
                real = alpha * real
                if COMPLEX:
                    imaginary = alpha * imaginary
            if FIXED:
                sum_real += tl.where(inside, slope_real, 0.0)
                if COMPLEX_A:
                    sum_imaginary += tl.where(inside, slope_imaginary, 0.0)
            else:
                tl.store(da + (out + t * d) * PARTS_A, slope_real, mask=inside)
                if COMPLEX_A:
                    tl.store(da + (out + t * d) * PARTS_A + 1, slope_imaginary, mask=inside)
    tl.store(dinitial + at * PARTS, real, mask=here)
    if COMPLEX:
        tl.store(dinitial + at * PARTS + 1, imaginary, mask=here)
    if FIXED:
        tl.store(da + at * PARTS_A, sum_real, mask=here)
        if COMPLEX_A:
            tl.store(da + at * PARTS_A + 1, sum_imaginary, mask=here)
