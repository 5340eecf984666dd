"""Functions that Triton kernels of several ops call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """By its series near 0, where 1 - exp(-2x) has lost its digits."""
    square = x * x
    series = 62 / 2835 * square - 17 / 315
    series = (series * square + 2 / 15) * square - 1 / 3
    series = x + x * square * series
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -far, far))
