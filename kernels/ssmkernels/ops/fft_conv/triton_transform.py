"""Fourier transforms as products on the matrix units (Fu et al. 2023, FlashFFTConv), for convolutions on a circle.

A real sequence a of 2M points is the polynomial Σ_j a_j X^j, and products are taken where X^2M = -1: what leaves the
circle at one end comes back at the other with its sign turned. Where X^M = i, that polynomial is one of M complex
numbers, z_j = a_j + i a_{j+M}: no spectrum has to be untangled, and a sequence of at most M points has no imaginary
part. Z are its values at the M roots X = exp(iπ(1 - 4k)/2M). With M = 16 N, j = n1 N + n and k = k1 + 16 k' they are

    Z[k1, k'] = Σ_n exp(-2πi n k'/N)  exp(iπ n(1 - 4 k1)/2M)  Σ_n1 exp(iπ n1(1 - 4 k1)/32)  z[n1, n]

where the sum over n is one of N = 16, or two in turn of N = 16 N3, n = n2 N3 + n3, N3 = 2, 4, 8 or 16. Each sum is a
16 x 16 matrix times 16 rows, that over n3 with 16/N3 of its matrices in one; between two of them the axis that comes
next moves to the front. Z stays in the order (k3, k1, k2). The way back takes all matrices transposed and conjugate,
in the other order; the adjoint of a convolution takes the conjugate spectrum.

Numbers have float32's precision: each is the sum of two in float16, which keep 22 bits, so that a product is three.
Before each transform a power of two brings the largest number to where float16 has room both for sums of 256 and for
what the second half holds. Some matrix units cut off what a sum loses instead of rounding, which shrinks every number
a little: so the largest products stand in two sums, which are added elsewhere.

``matrices`` are (3, high and low, real and imaginary, 16, 16); ``twiddles`` those after the first and the second sum
in float32, (real and imaginary, k1, n) and (.., k2, n3).
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a loop or a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

R = tl.constexpr(16)  # the least that matrix units take


@triton.jit
def places(M: tl.constexpr):
    """M places in memory, as 16 rows."""
    return tl.arange(0, R)[:, None] * (M // R) + tl.arange(0, M // R)[None, :]


@triton.jit
def normal(re, im):
    """The power of two that brings the largest part to [2³, 2⁴), and its inverse; numbers below 2⁻¹²³ stay smaller."""
    largest = tl.max(tl.maximum(tl.abs(re), tl.abs(im)))
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 4)
    factor = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    return factor, ((exponent - 3) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """x in float32 as the sum of two numbers in float16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def add_small(sums, a, b):
    """What the second halves add to sums + a b."""
    return tl.dot(a[1], b[0], tl.dot(a[0], b[1], sums))


@triton.jit
def multiply(table, re, im, BACK: tl.constexpr, FROM_REAL: tl.constexpr, TO_REAL: tl.constexpr):
    """A matrix, or with ``BACK`` its conjugate transpose, times 16 rows.

    Their imaginary part is zero with ``FROM_REAL``, and nobody asks for that of the result with ``TO_REAL``.
    """
    i, k = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    table += k * R + i if BACK else i * R + k
    cos = tl.load(table), tl.load(table + 2 * R * R)
    high, low = tl.load(table + R * R), tl.load(table + 3 * R * R)
    sin, minus_sin = (high, low), (-high, -low)
    if BACK:
        sin, minus_sin = minus_sin, sin
    x, y = halves(re), halves(im)
    re = add_small(tl.zeros_like(re), cos, x)
    if not FROM_REAL:
        re = tl.dot(minus_sin[0], y[0], add_small(re, minus_sin, y))
    re = tl.fma(tl.dot(cos[0], x[0]), 1.0, re)  # of a plain + Triton would make one sum
    if not TO_REAL:
        im = add_small(tl.zeros_like(im), sin, x)
        if not FROM_REAL:
            im = tl.dot(cos[0], y[0], add_small(im, cos, y))
        im = tl.fma(tl.dot(sin[0], x[0]), 1.0, im)
    return re, im


@triton.jit
def turn(re, im, twiddles, part, at, BACK: tl.constexpr):
    """Times the twiddles ``at`` these places, or with ``BACK`` their conjugates; ``part`` is their number."""
    cos, sin = tl.load(twiddles + at), tl.load(twiddles + part + at)
    if BACK:
        sin = -sin
    return re * cos - im * sin, re * sin + im * cos


@triton.jit
def inner(N3: tl.constexpr):
    """Which twiddles follow the second transform, whose rows are k2 and columns (n3, k1)."""
    return tl.arange(0, R)[:, None] * N3 + (tl.arange(0, R * N3) // R)[None, :]


@triton.jit
def rotate(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """(a, b, c) → (b, c, a), both as 16 rows."""
    return tl.reshape(tl.permute(tl.reshape(x, (A, B, C)), (1, 2, 0)), (R, A * B * C // R))


@triton.jit
def rotate_back(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """(b, c, a) → (a, b, c), both as 16 rows."""
    return tl.reshape(tl.permute(tl.reshape(x, (B, C, A)), (2, 0, 1)), (R, A * B * C // R))


@triton.jit
def transform(re, im, matrices, twiddles, M: tl.constexpr, FOLDED: tl.constexpr):
    """z → Z. Without ``FOLDED`` there is no imaginary part."""
    N3: tl.constexpr = M // (R * R)
    tl.debug_barrier()  # or the compiler keeps matrices and twiddles in registers from one transform to the next
    factor, inverse = normal(re, im)
    re, im = multiply(matrices, re * factor, im * factor, False, not FOLDED, False)
    re, im = turn(re, im, twiddles, M, places(M), False)
    re, im = rotate(re, R, R, N3), rotate(im, R, R, N3)  # (k1 n2 n3) → (n2 n3 k1)
    re, im = multiply(matrices + 4 * R * R, re, im, False, False, False)
    if N3 > 1:
        re, im = turn(re, im, twiddles + 2 * M, R * N3, inner(N3), False)
        re, im = rotate(re, R, N3, R), rotate(im, R, N3, R)  # (k2 n3 k1) → (n3 k1 k2)
        re, im = multiply(matrices + 8 * R * R, re, im, False, False, False)
    return re * inverse, im * inverse


@triton.jit
def restore(re, im, matrices, twiddles, M: tl.constexpr, FOLDED: tl.constexpr):
    """Z → z. Without ``FOLDED`` nobody asks for the imaginary part."""
    N3: tl.constexpr = M // (R * R)
    tl.debug_barrier()  # as above
    factor, inverse = normal(re, im)
    re, im = re * factor, im * factor
    if N3 > 1:
        re, im = multiply(matrices + 8 * R * R, re, im, True, False, False)
        re, im = rotate_back(re, R, N3, R), rotate_back(im, R, N3, R)
        re, im = turn(re, im, twiddles + 2 * M, R * N3, inner(N3), True)
    re, im = multiply(matrices + 4 * R * R, re, im, True, False, False)
    re, im = rotate_back(re, R, R, N3), rotate_back(im, R, R, N3)
    re, im = turn(re, im, twiddles, M, places(M), True)
    re, im = multiply(matrices, re, im, True, False, not FOLDED)
    inverse = inverse / M
    return re * inverse, im * inverse
