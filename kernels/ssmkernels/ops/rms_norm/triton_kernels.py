"""The Triton kernels of root-mean-square normalisation.

A program takes one group of channels, whole, of ``ROWS`` rows, and in the backward pass of ``PART`` rows, of which it
stores the sum of the weight's gradient. Offsets are 64-bit; what is written is contiguous; what is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype changes where a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid, zeros


@triton.jit
def load(x, row, channel, here, WIDE: tl.constexpr):
    """(ROWS, BLOCK) of a :class:`Strided` tensor (rows d)."""
    return tl.load(x.at + row * x.batch + channel, mask=here, other=0.0).to(WIDE)


@triton.jit
def load_sum(x, residual, row, channel, here, WIDE: tl.constexpr):
    """x, or x + residual as the residual's dtype has it."""
    r = load(x, row, channel, here, WIDE)
    if residual is not None:
        r = (r + load(residual, row, channel, here, WIDE)).to(residual.at.dtype.element_ty).to(WIDE)
    return r


@triton.jit
def inverse(v, dims: tl.constexpr):
    """1 / √(mean(v²) + eps) of each row, (ROWS, 1)."""
    return 1 / tl.sqrt(tl.sum(v * v, axis=1) / dims.GROUP + dims.EPS)[:, None]


@triton.jit(do_not_specialize=["rows"])
def forward(x, weight, gate, residual, y, summed, rows, dims: tl.constexpr):
    """y, and with a residual x + residual, (rows d)."""
    WIDE: tl.constexpr = weight.dtype.element_ty
    groups: tl.constexpr = dims.D // dims.GROUP
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // groups * dims.ROWS + tl.arange(0, dims.ROWS))[:, None]
    within = tl.arange(0, dims.BLOCK)[None, :]
    channel = pid % groups * dims.GROUP + within
    here, to = (row < rows) & (within < dims.GROUP), row * dims.D + channel
    v = load_sum(x, residual, row, channel, here, WIDE)
    if residual is not None:
        tl.store(summed + to, v.to(summed.dtype.element_ty), mask=here)
    if gate is not None:
        g = load(gate, row, channel, here, WIDE)
        g *= sigmoid(g)
    if gate is not None and dims.GATE_FIRST:
        v *= g
    v *= inverse(v, dims) * tl.load(weight + channel, mask=within < dims.GROUP, other=0.0)
    if gate is not None and not dims.GATE_FIRST:
        v *= g
    tl.store(y + to, v.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def backward(
    x, weight, gate, residual, dy, dsummed, dx, dgate, dresidual, parts, rows, PART: tl.constexpr, dims: tl.constexpr
):
    """dx, dgate and dresidual (rows d), and each part of the rows' sum of the weight's gradient, (parts d)."""
    WIDE: tl.constexpr = weight.dtype.element_ty
    groups: tl.constexpr = dims.D // dims.GROUP
    pid = tl.program_id(0).to(tl.int64)
    part = pid // groups
    within = tl.arange(0, dims.BLOCK)[None, :]
    channel = pid % groups * dims.GROUP + within
    w = tl.load(weight + channel, mask=within < dims.GROUP, other=0.0)
    total = zeros(dims.ROWS, dims.BLOCK, WIDE)
    for first in range(0, PART, dims.ROWS):
        row = (part * PART + first + tl.arange(0, dims.ROWS))[:, None]
        here, to = (row < rows) & (within < dims.GROUP), row * dims.D + channel
        r = load_sum(x, residual, row, channel, here, WIDE)
        d = load(dy, row, channel, here, WIDE)
        v = r
        if gate is not None:
            g = load(gate, row, channel, here, WIDE)
            open = sigmoid(g)
            slope = open * (1 + g * (1 - open))
            g *= open
            if dims.GATE_FIRST:
                v = r * g
        scale = inverse(v, dims)
        v *= scale  # normalised
        if gate is not None and not dims.GATE_FIRST:
            tl.store(dgate + to, (d * v * w * slope).to(dgate.dtype.element_ty), mask=here)
            d *= g
        total += d * v
        d *= w
        d = scale * (d - v * (tl.sum(d * v, axis=1) / dims.GROUP)[:, None])
        if gate is not None and dims.GATE_FIRST:
            tl.store(dgate + to, (d * r * slope).to(dgate.dtype.element_ty), mask=here)
            d *= g
        if dsummed is not None:
            d += load(dsummed, row, channel, here, WIDE)
        if residual is not None:
            tl.store(dresidual + to, d.to(dresidual.dtype.element_ty), mask=here)
        tl.store(dx + to, d.to(dx.dtype.element_ty), mask=here)
    sums = tl.sum(total, axis=0)[None, :]
    tl.store(parts + part * dims.D + channel, sums, mask=within < dims.GROUP)
