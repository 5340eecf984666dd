"""The linear recurrence's Triton kernels.

A sequence is cut into chunks of ``SPAN`` steps, so that one long sequence fills a GPU. ``summaries`` finds what each
chunk makes of the state before it, ``walk`` the state before each chunk, and ``forward`` all states. Backward does the
same with the gradient of the state, from the end. Sequences of one chunk need the last kernel alone.

A program holds the states of ``BLOCK_D`` channels in registers and walks one chunk, ``T`` steps at a time: the inputs
of all ``T`` are loaded before any of them is used. Steps beyond a chunk's end have a = 1 and b = 0.

Complex tensors come as real ones of twice as many numbers, real and imaginary parts by turns; strides count numbers.
With LOG, a holds logarithms; of complex ones the exponentials, as sine and cosine would spill registers. What is
absent is None, offsets are 64-bit, and all that is written is contiguous.
"""

# mypy: disable-error-code="assignment"
# (tuples of registers grow in unrolled loops)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.linear_recurrence.triton_chunk_kernels import summaries, walk
from ssmkernels.ops.linear_recurrence.triton_pieces import extent, rows

__all__ = ["backward", "forward", "summaries", "walk"]


@triton.jit(do_not_specialize=["length", "per_sequence"])
def forward(
    a,
    b,
    before,
    cu_seqlens,
    owners,
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
    per_sequence,
    d,
    COMPLEX: tl.constexpr,
    COMPLEX_A: tl.constexpr,
    LOG: tl.constexpr,
    SPAN: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h, the final state, and where it is wanted every state in the precision of sums.

    ``before`` are the states before the chunks; the final state may lie where it does, if each sequence is one chunk.
    """
    WIDE: tl.constexpr = final.dtype.element_ty
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    chunk, sequence, batch, start, steps, _, last, channel = extent(
        tl.program_id(0), cu_seqlens, owners, length, per_sequence, d, SPAN, BLOCK_D
    )
    here = channel < d
    a += batch * a_batch + start * a_time + channel * a_d
    b += batch * b_batch + start * b_time + channel * b_d
    out = ((batch * length + start) * d + channel) * PARTS
    at = (chunk * d + channel) * PARTS
    real, imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    if before is not None:
        real += tl.load(before + at, mask=here, other=0.0)
        if COMPLEX:
            imaginary += tl.load(before + at + 1, mask=here, other=0.0)
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
    at = (sequence * d + channel) * PARTS
    tl.store(final + at, real, mask=here & last)
    if COMPLEX:
        tl.store(final + at + 1, imaginary, mask=here & last)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def backward(
    a,
    states,
    initial,
    cu_seqlens,
    owners,
    dh,
    after,
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
    per_sequence,
    d,
    COMPLEX: tl.constexpr,
    COMPLEX_A: tl.constexpr,
    LOG: tl.constexpr,
    FIXED: tl.constexpr,
    SPAN: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With g_t = dh_t + conj(a_{t+1}) g_{t+1}: db_t = g_t, and da_t = g_t conj(h_{t-1}), times conj(a_t) for log a.

    Of a fixed decay, da is the sum over each chunk. ``after`` are the gradients of the states after the chunks.
    """
    WIDE: tl.constexpr = dinitial.dtype.element_ty
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    PARTS_A: tl.constexpr = 2 if COMPLEX_A else 1
    chunk, sequence, batch, start, steps, begins, _, channel = extent(
        tl.program_id(0), cu_seqlens, owners, length, per_sequence, d, SPAN, BLOCK_D
    )
    here = channel < d
    a += batch * a_batch + start * a_time + channel * a_d
    dh += batch * dh_batch + start * dh_time + channel * dh_d
    out = (batch * length + start) * d + channel
    states += out * PARTS
    at, of_chunk = sequence * d + channel, chunk * d + channel
    real, imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    sum_real, sum_imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    if after is not None:
        real += tl.load(after + of_chunk * PARTS, mask=here, other=0.0)
        if COMPLEX:
            imaginary += tl.load(after + of_chunk * PARTS + 1, mask=here, other=0.0)
    goes_on = here & (begins == 0) & (steps > 0)
    start_real = tl.load(states - d * PARTS, mask=goes_on, other=0.0).to(WIDE)
    start_imaginary = tl.zeros([BLOCK_D], WIDE)
    if COMPLEX:
        start_imaginary += tl.load(states - d * PARTS + 1, mask=goes_on, other=0.0)
    if initial is not None:
        start_real += tl.load(initial + at * PARTS, mask=here & begins, other=0.0)
        if COMPLEX:
            start_imaginary += tl.load(initial + at * PARTS + 1, mask=here & begins, other=0.0)
    pieces = (steps + T - 1) // T
    for piece in range(pieces):
        first = (pieces - 1 - piece) * T
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
    tl.store(dinitial + at * PARTS, real, mask=here & begins)
    if COMPLEX:
        tl.store(dinitial + at * PARTS + 1, imaginary, mask=here & begins)
    if FIXED:
        tl.store(da + of_chunk * PARTS_A, sum_real, mask=here)
        if COMPLEX_A:
            tl.store(da + of_chunk * PARTS_A + 1, sum_imaginary, mask=here)
