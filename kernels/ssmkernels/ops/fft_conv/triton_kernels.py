"""Triton kernels for the long convolution: one program takes one channel of one sequence on a circle of 2M points.

How a circle carries a sequence, and what its transform is: see triton_transform.py. Sequences lie channel by channel,
contiguous; spectra are (d, real and imaginary, M) in float32. What is absent is None. Offsets are 64-bit.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.fft_conv.triton_transform import R, places, restore, transform


@triton.jit
def place(row, channel, channels, spans, length):
    """Where a channel of a sequence starts, and the sequence's length; ``spans`` are packed ones' (rows, 2) borders."""
    if spans is not None:
        start = tl.load(spans + 2 * row)
        return channel * length + start, tl.load(spans + 2 * row + 1) - start
    return (tl.cast(channels, tl.int64) * row + channel) * length, length


@triton.jit
def fold(x, length, M: tl.constexpr, FOLDED: tl.constexpr):
    """A sequence as M complex numbers, zero beyond its end."""
    j = places(M)
    re = tl.load(x + j, mask=j < length, other=0.0).to(tl.float32)
    im = tl.zeros_like(re)
    if FOLDED:
        im = tl.load(x + j + M, mask=j + M < length, other=0.0).to(tl.float32)
    return re, im


@triton.jit
def gated(re, im, gate, length, M: tl.constexpr, FOLDED: tl.constexpr):
    """Times the gate of a sequence, a null one standing for 1; 1 from its ``length`` on."""
    if gate is not None:
        j = places(M)
        re *= tl.load(gate + j, mask=j < length, other=1.0).to(tl.float32)
        if FOLDED:
            im *= tl.load(gate + j + M, mask=j + M < length, other=1.0).to(tl.float32)
    return re, im


@triton.jit
def tap(kernel, kernel_step, reverse, reverse_step, j, taps, ahead, N: tl.constexpr):
    """The weights at places j of the 2M points: lag 0 at the first, lag -1 at the last with its sign turned."""
    found = tl.load(kernel + j * kernel_step, mask=j < taps, other=0.0).to(tl.float32)
    if reverse is not None:
        back = N - 1 - j
        found -= tl.load(reverse + back * reverse_step, mask=back < ahead, other=0.0).to(tl.float32)
    return found


@triton.jit(do_not_specialize=["kernel_channel", "kernel_step", "reverse_channel", "reverse_step", "taps", "ahead"])
def spectrum(
    kernel,
    reverse,
    out,
    matrices,
    twiddles,
    kernel_channel,
    kernel_step,
    reverse_channel,
    reverse_step,
    taps,
    ahead,
    M: tl.constexpr,
):
    """One channel's kernel (taps) and reverse kernel (ahead) → out (d, real and imaginary, M)."""
    channel = tl.program_id(0).to(tl.int64)
    kernel += channel * kernel_channel
    if reverse is not None:
        reverse += channel * reverse_channel
    j = places(M).to(tl.int64)
    re = tap(kernel, kernel_step, reverse, reverse_step, j, taps, ahead, 2 * M)
    im = tap(kernel, kernel_step, reverse, reverse_step, j + M, taps, ahead, 2 * M)
    re, im = transform(re, im, matrices, twiddles, M, True)
    out += channel * 2 * M + places(M)
    tl.store(out, re)
    tl.store(out + M, im)


@triton.jit(do_not_specialize=["rows", "channels", "length"])
def convolve(
    x,
    spectra,
    skip,
    gate,
    y,
    spans,
    matrices,
    twiddles,
    rows,
    channels,
    length,
    M: tl.constexpr,
    FOLDED: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """y = gate (the convolution of x + skip x), or the adjoint, for one channel of one sequence."""
    row, channel = tl.program_id(0) % rows, (tl.program_id(0) // rows).to(tl.int64)
    start, here = place(row, channel, channels, spans, length)
    x += start
    y += start
    if gate is not None:
        gate += start
    j = places(M)
    re, im = fold(x, here, M, FOLDED)
    if ADJOINT:
        re, im = gated(re, im, gate, here, M, FOLDED)
    re, im = transform(re, im, matrices, twiddles, M, FOLDED)
    spectra += channel * 2 * M + j
    k_re, k_im = tl.load(spectra), tl.load(spectra + M)
    if ADJOINT:
        k_im = -k_im
    re, im = re * k_re - im * k_im, re * k_im + im * k_re
    re, im = restore(re, im, matrices, twiddles, M, FOLDED)
    if skip is not None:
        weight = tl.load(skip + channel)
        x_re, x_im = fold(x, here, M, FOLDED)
        if ADJOINT:
            x_re, x_im = gated(x_re, x_im, gate, here, M, FOLDED)
        re += weight * x_re
        if FOLDED:
            im += weight * x_im
    if not ADJOINT:
        re, im = gated(re, im, gate, here, M, FOLDED)
    tl.store(y + j, re.to(y.dtype.element_ty), mask=j < here)
    if FOLDED:
        tl.store(y + j + M, im.to(y.dtype.element_ty), mask=j + M < here)


@triton.jit(do_not_specialize=["rows", "channels", "length", "share"])
def correlate(
    x,
    g,
    gate,
    out,
    at_zero,
    spans,
    matrices,
    twiddles,
    rows,
    channels,
    length,
    share,
    M: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """The spectrum of Σ_t g_{t+j} x_t over lags j, summed over ``share`` sequences of one channel; g times the gate.

    Goes to out (parts, d, real and imaginary, M), and the sum at lag 0 as it stands to at_zero (parts, d).
    """
    channel, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, end = part * share, tl.minimum((part + 1) * share, rows)
    sum_re = tl.zeros((R, M // R), dtype=tl.float32)
    sum_im, g_re, g_im = sum_re, sum_re, sum_re
    for step in tl.range(2 * first, 2 * end, disable_licm=True):  # g and x in turn; invariants would take registers
        start, here = place(step // 2, channel, channels, spans, length)
        second = step % 2 == 1
        re, im = fold(tl.where(second, x, g) + start, here, M, FOLDED)
        if gate is not None:
            re, im = gated(re, im, gate + start, tl.where(second, 0, here), M, FOLDED)
        re, im = transform(re, im, matrices, twiddles, M, FOLDED)
        sum_re = tl.where(second, sum_re + g_re * re + g_im * im, sum_re)
        sum_im = tl.where(second, sum_im + g_im * re - g_re * im, sum_im)
        g_re, g_im = re, im
    at = tl.cast(channels, tl.int64) * part + channel
    out += at * 2 * M + places(M)
    tl.store(out, sum_re)
    tl.store(out + M, sum_im)
    if at_zero is not None:
        total = 0.0
        for row in range(first, end):
            start, here = place(row, channel, channels, spans, length)
            g_re, g_im = fold(g + start, here, M, FOLDED)
            if gate is not None:
                g_re, g_im = gated(g_re, g_im, gate + start, here, M, FOLDED)
            re, im = fold(x + start, here, M, FOLDED)
            total += tl.sum(g_re * re + g_im * im)
        tl.store(at_zero + at, total)


@triton.jit(do_not_specialize=["channels", "parts", "taps", "ahead", "kernel_channel", "reverse_channel"])
def lags(
    sums,
    dkernel,
    dreverse,
    matrices,
    twiddles,
    channels,
    parts,
    taps,
    ahead,
    kernel_channel,
    reverse_channel,
    M: tl.constexpr,
):
    """Parts of ``correlate`` → dkernel (d taps) and dreverse (d ahead) in float32."""
    channel = tl.program_id(0).to(tl.int64)
    sums += channel * 2 * M + places(M)
    re, im = tl.load(sums), tl.load(sums + M)
    step = tl.cast(channels, tl.int64) * 2 * M
    for _ in range(1, parts):
        sums += step
        re += tl.load(sums)
        im += tl.load(sums + M)
    re, im = restore(re, im, matrices, twiddles, M, True)
    j = places(M)
    dkernel += channel * kernel_channel + j
    tl.store(dkernel, re, mask=j < taps)
    tl.store(dkernel + M, im, mask=j + M < taps)
    if dreverse is not None:
        back = 2 * M - 1 - j
        dreverse += channel * reverse_channel + back
        tl.store(dreverse, -re, mask=back < ahead)
        tl.store(dreverse - M, -im, mask=back - M < ahead)
