"""Triton kernels for sums of powers, K_t = Σ_n weight_n ratio_n^t, and their gradients.

With blocks of ``R`` taps and t = q R + i the sum is a product of what each block starts from, weight ratio^{qR}, and
of the powers within a block, ratio^i. A program makes those powers itself: with i = 16 k + j, each is
ratio^{16k} ratio^j, one product of entries of two tables of at most 16. Tables come from float64, and each number here
is a few roundings from the true one, however high the power.

A table is (real and imaginary part, d, entries, n), contiguous, in the dtype of sums; ``part`` is the number of
elements of one of its parts. Offsets are 64-bit.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

J = tl.constexpr(16)  # powers that the finer table has


@triton.jit
def entries(table, part, index, here, states, there, n, COMPLEX: tl.constexpr):
    """Entries ``index`` of a table for ``states``, both parts; shapes broadcast. Masked ones are 0."""
    at = table + index * n + states
    re = tl.load(at, mask=here & there, other=0.0)
    im = re
    if COMPLEX:
        im = tl.load(at + part, mask=here & there, other=0.0)
    return re, im


@triton.jit
def times(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    """A product; imaginary parts of real numbers are nobody's."""
    if COMPLEX:
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re
    return a_re * b_re, a_im


@triton.jit
def powers(fine, fine_part, coarse, coarse_part, i, here, states, there, n, COMPLEX: tl.constexpr):
    """ratio^i for steps i and states, whose shapes broadcast to that of the result."""
    low_re, low_im = entries(fine, fine_part, i % J, here, states, there, n, COMPLEX)
    high_re, high_im = entries(coarse, coarse_part, i // J, here, states, there, n, COMPLEX)
    return times(high_re, high_im, low_re, low_im, COMPLEX)


@triton.jit(do_not_specialize=["length", "blocks", "starts_part", "fine_part", "coarse_part"])
def forward(
    starts,
    fine,
    coarse,
    taps,
    starts_part,
    fine_part,
    coarse_part,
    length,
    blocks,
    n: tl.constexpr,
    COMPLEX: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    I: tl.constexpr,
    N: tl.constexpr,
):
    """``Q`` blocks' taps, ``I`` of each, for one channel."""
    channel = tl.program_id(0).to(tl.int64)
    q = (tl.program_id(1) * Q + tl.arange(0, Q))[:, None]
    i = (tl.program_id(2) * I + tl.arange(0, I))[None, :]
    starts += channel * blocks * n
    fine += channel * J * n
    coarse += channel * (R // J) * n
    sums = tl.zeros((Q, I), dtype=taps.dtype.element_ty)
    for first in range(0, n, N):
        across, down = first + tl.arange(0, N)[None, :], first + tl.arange(0, N)[:, None]
        start_re, start_im = entries(starts, starts_part, q, q < blocks, across, across < n, n, COMPLEX)
        power_re, power_im = powers(fine, fine_part, coarse, coarse_part, i, i < R, down, down < n, n, COMPLEX)
        sums = tl.dot(start_re, power_re, sums, input_precision="ieee", out_dtype=sums.dtype)
        if COMPLEX:
            sums = tl.dot(-start_im, power_im, sums, input_precision="ieee", out_dtype=sums.dtype)
    if COMPLEX:
        sums *= 2
    t = q.to(tl.int64) * R + i
    tl.store(taps + channel * length + t, sums, mask=t < length)


@triton.jit(do_not_specialize=["length", "blocks", "starts_part", "fine_part", "coarse_part", "found_part"])
def backward(
    starts,
    fine,
    coarse,
    last,
    dtaps,
    dratio,
    dweight,
    starts_part,
    fine_part,
    coarse_part,
    found_part,
    length,
    blocks,
    n: tl.constexpr,
    COMPLEX: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    I: tl.constexpr,
    N: tl.constexpr,
):
    """What ``Q`` blocks add to the gradients of one channel's ``N`` states, but for a factor conj(weight) of dratio.

    Here ``starts`` are the powers ratio^{qR} alone, and ``last``, a table of one entry, is ratio^{R-1}. The derivative
    of ratio^t is ratio^{qR} (i ratio^{i-1}) + (q R ratio^{qR-1}) ratio^i: nothing is divided by a ratio, which may be
    0. Everything is summed without conjugates: the gradient of real taps is the conjugate of that.
    """
    channel, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks_here = tile * Q + tl.arange(0, Q)
    q, across = blocks_here[:, None], (tl.program_id(2) * N + tl.arange(0, N))[None, :]
    there = across < n
    WIDE: tl.constexpr = dtaps.dtype.element_ty
    dtaps += channel * length
    fine += channel * J * n
    coarse += channel * (R // J) * n
    plain_re = tl.zeros((Q, N), dtype=WIDE)
    plain_im, derived_re, derived_im = plain_re, plain_re, plain_re
    for first in range(0, R, I):
        i, down = first + tl.arange(0, I)[None, :], first + tl.arange(0, I)[:, None]
        t = q.to(tl.int64) * R + i
        g = tl.load(dtaps + t, mask=t < length, other=0.0)
        re, im = powers(fine, fine_part, coarse, coarse_part, down, down < R, across, there, n, COMPLEX)
        plain_re = tl.dot(g, re, plain_re, input_precision="ieee", out_dtype=WIDE)
        if COMPLEX:
            plain_im = tl.dot(g, im, plain_im, input_precision="ieee", out_dtype=WIDE)
        before = tl.maximum(down - 1, 0)
        re, im = powers(fine, fine_part, coarse, coarse_part, before, down < R, across, there, n, COMPLEX)
        derived_re = tl.dot(g, re * down.to(WIDE), derived_re, input_precision="ieee", out_dtype=WIDE)
        if COMPLEX:
            derived_im = tl.dot(g, im * down.to(WIDE), derived_im, input_precision="ieee", out_dtype=WIDE)
    starts += channel * blocks * n
    re, im = entries(starts, starts_part, q, q < blocks, across, there, n, COMPLEX)
    weight_re, weight_im = times(plain_re, plain_im, re, im, COMPLEX)
    ratio_re, ratio_im = times(derived_re, derived_im, re, im, COMPLEX)
    re, im = entries(starts, starts_part, q - 1, (q > 0) & (q < blocks), across, there, n, COMPLEX)
    last_re, last_im = entries(last, n * tl.num_programs(0), channel, channel >= 0, across, there, n, COMPLEX)
    re, im = times(re, im, last_re, last_im, COMPLEX)
    re, im = times(re, im, plain_re, plain_im, COMPLEX)
    count = (q * R).to(WIDE)
    at = (tile * tl.num_programs(0) + channel) * n + tl.program_id(2) * N + tl.arange(0, N)
    mask = tl.program_id(2) * N + tl.arange(0, N) < n
    tl.store(dweight + at, tl.sum(weight_re, axis=0), mask=mask)
    tl.store(dratio + at, tl.sum(ratio_re + count * re, axis=0), mask=mask)
    if COMPLEX:
        tl.store(dweight + found_part + at, tl.sum(weight_im, axis=0), mask=mask)
        tl.store(dratio + found_part + at, tl.sum(ratio_im + count * im, axis=0), mask=mask)
