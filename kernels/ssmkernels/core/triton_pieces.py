"""Functions that Triton kernels of several ops call."""

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.strided import Strided


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a few roundings. With e = exp(-abs(x)), log(1 + e) = 2 atanh(e / (2 + e)), a short series."""
    e = tl.exp(-tl.abs(x))
    if x.dtype == tl.float64:
        one = 1 + e
        log = tl.where(one == 1, e, tl.log(one) * (e / (one - 1)))
    else:
        s = e / (2 + e)  # at most 1/3
        q = s * s
        series = 1 / 13 + q * (1 / 15)
        series = 1 / 9 + q * (1 / 11 + q * series)
        series = 1 / 5 + q * (1 / 7 + q * series)
        log = 2 * s * (1 + q * (1 / 3 + q * series))
    return tl.maximum(x, 0.0) + log


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


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr = 0, WIDE: tl.constexpr = tl.float32):
    """(ROWS, COLUMNS), or (ROWS) without columns. A shape in parentheses does not take the fields of a tuple."""
    if COLUMNS:
        found = tl.zeros((ROWS, COLUMNS), WIDE)
    else:
        found = tl.zeros((ROWS,), WIDE)
    return found


@triton.jit
def head_of(x, batch, head):
    """One head of a :class:`Strided` tensor: the same strides from another place on."""
    return Strided(x.at + (batch * x.batch + head * x.head), x.batch, x.time, x.head, x.step)


@triton.jit
def heads_of(q, k, a, b, batch, head):
    """One head of each of four tensors."""
    return head_of(q, batch, head), head_of(k, batch, head), head_of(a, batch, head), head_of(b, batch, head)


@triton.jit
def load_channels(x, batch, head, channel, SIZE: tl.constexpr):
    """(channels) of one head of one token; 0 from channel ``SIZE`` on."""
    at = x.at + (batch * x.batch + head * x.head) + channel * x.step
    return tl.load(at, mask=channel < SIZE, other=0.0)
