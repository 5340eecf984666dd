"""The linear recurrence's Triton kernels that lead to the states between chunks."""

# mypy: disable-error-code="assignment"
# (tuples of registers grow in unrolled loops)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.linear_recurrence.triton_pieces import block_of, extent, finite, rows, times


@triton.jit(do_not_specialize=["length", "per_sequence"])
def summaries(
    a,
    b,
    cu_seqlens,
    owners,
    decay,
    added,
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
    REVERSE: tl.constexpr,
    SPAN: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(chunks d): the product of a chunk's decays, and the state after it from 0 before it.

    In reverse, of the conjugates of a, and what a chunk makes of a gradient of 0 after it: b is then that of h.
    """
    WIDE: tl.constexpr = added.dtype.element_ty
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    PARTS_A: tl.constexpr = 2 if COMPLEX_A else 1
    FROM: tl.constexpr = T - 1 if REVERSE else 0
    TO: tl.constexpr = -1 if REVERSE else T
    BY: tl.constexpr = -1 if REVERSE else 1
    chunk, _, batch, start, steps, _, _, channel = extent(
        tl.program_id(0), cu_seqlens, owners, length, per_sequence, d, SPAN, BLOCK_D
    )
    here = channel < d
    a += batch * a_batch + start * a_time + channel * a_d
    b += batch * b_batch + start * b_time + channel * b_d
    real, imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    decay_real, decay_imaginary = tl.full([BLOCK_D], 1.0, WIDE), tl.zeros([BLOCK_D], WIDE)
    pieces = (steps + T - 1) // T
    for piece in range(pieces):
        first = (pieces - 1 - piece if REVERSE else piece) * T
        a_real = rows(a, a_time, here, first, steps, 0.0 if LOG and not COMPLEX_A else 1.0, T, WIDE)
        b_real = rows(b, b_time, here, first, steps, 0.0, T, WIDE)
        a_imaginary, b_imaginary = a_real, b_real
        if COMPLEX:
            b_imaginary = rows(b + 1, b_time, here, first, steps, 0.0, T, WIDE)
        if COMPLEX_A:
            a_imaginary = rows(a + 1, a_time, here, first, steps, 0.0, T, WIDE)
        for i in tl.static_range(FROM, TO, BY):
            alpha, beta = a_real[i], a_imaginary[i]
            if LOG and not COMPLEX_A:
                alpha = tl.exp(alpha)
            if REVERSE:
                beta = -beta
                real += b_real[i]
                if COMPLEX:
                    imaginary += b_imaginary[i]
            real, imaginary = times(alpha, beta, real, imaginary, COMPLEX, COMPLEX_A)
            if not REVERSE:
                real += b_real[i]
                if COMPLEX:
                    imaginary += b_imaginary[i]
            decay_real, decay_imaginary = times(alpha, beta, decay_real, decay_imaginary, COMPLEX_A, COMPLEX_A)
            decay_real = finite(decay_real)
            if COMPLEX_A:
                decay_imaginary = finite(decay_imaginary)
    at = chunk * d + channel
    tl.store(decay + at * PARTS_A, decay_real, mask=here)
    tl.store(added + at * PARTS, real, mask=here)
    if COMPLEX_A:
        tl.store(decay + at * PARTS_A + 1, decay_imaginary, mask=here)
    if COMPLEX:
        tl.store(added + at * PARTS + 1, imaginary, mask=here)


@triton.jit(do_not_specialize=["per_sequence"])
def walk(
    decay,
    added,
    initial,
    cu_seqlens,
    per_sequence,
    d,
    COMPLEX: tl.constexpr,
    COMPLEX_A: tl.constexpr,
    REVERSE: tl.constexpr,
    SPAN: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Replaces what a chunk makes of 0 by the state before it; in reverse, by the gradient of the state after it."""
    WIDE: tl.constexpr = added.dtype.element_ty
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    PARTS_A: tl.constexpr = 2 if COMPLEX_A else 1
    FROM: tl.constexpr = T - 1 if REVERSE else 0
    TO: tl.constexpr = -1 if REVERSE else T
    BY: tl.constexpr = -1 if REVERSE else 1
    sequence, channel = block_of(tl.program_id(0), d, BLOCK_D)
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        first, count = begin // SPAN + sequence, (end - begin + SPAN - 1) // SPAN
    else:
        first, count = sequence * per_sequence, sequence * 0 + per_sequence
    here = channel < d
    decay += (first * d + channel) * PARTS_A
    added += (first * d + channel) * PARTS
    real, imaginary = tl.zeros([BLOCK_D], WIDE), tl.zeros([BLOCK_D], WIDE)
    if initial is not None:
        at = (sequence * d + channel) * PARTS
        real += tl.load(initial + at, mask=here, other=0.0)
        if COMPLEX:
            imaginary += tl.load(initial + at + 1, mask=here, other=0.0)
    count = tl.maximum(count, 1)  # an empty sequence has a chunk too
    pieces = (count + T - 1) // T
    for piece in range(pieces):
        start = (pieces - 1 - piece if REVERSE else piece) * T
        a_real = rows(decay, d * PARTS_A, here, start, count, 1.0, T, WIDE)
        b_real = rows(added, d * PARTS, here, start, count, 0.0, T, WIDE)
        a_imaginary, b_imaginary = a_real, b_real
        if COMPLEX:
            b_imaginary = rows(added + 1, d * PARTS, here, start, count, 0.0, T, WIDE)
        if COMPLEX_A:
            a_imaginary = rows(decay + 1, d * PARTS_A, here, start, count, 0.0, T, WIDE)
        for i in tl.static_range(FROM, TO, BY):
            inside = here & (start + i < count)
            to = added + (tl.cast(start, tl.int64) + i) * d * PARTS
            tl.store(to, real, mask=inside)
            if COMPLEX:
                tl.store(to + 1, imaginary, mask=inside)
            real, imaginary = times(a_real[i], a_imaginary[i], real, imaginary, COMPLEX, COMPLEX_A)
            real += b_real[i]
            if COMPLEX:
                imaginary += b_imaginary[i]
