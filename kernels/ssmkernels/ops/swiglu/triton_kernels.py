"""The Triton kernels of the gated product.

A program takes ``ROWS`` rows and ``BLOCK`` of their channels. The scale is a constant of a model, and so of the kernel.
Offsets are 64-bit; what is written is contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid


@triton.jit
def place(x, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a program's numbers lie in a :class:`Strided` tensor (rows d) and in a contiguous one, and which exist."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // blocks * ROWS + tl.arange(0, ROWS))[:, None]
    channel = (pid % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    return x.at + row * x.batch + channel, row * D + channel, (row < rows) & (channel < D)


@triton.jit(do_not_specialize=["rows"])
def forward(gate, up, y, rows, D: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y (rows d)."""
    WIDE: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    at, to, here = place(gate, rows, D, ROWS, BLOCK)
    g = SCALE * tl.load(at, mask=here, other=0.0).to(WIDE)
    at, _, _ = place(up, rows, D, ROWS, BLOCK)
    product = g * sigmoid(g) * tl.load(at, mask=here, other=0.0).to(WIDE)
    tl.store(y + to, product.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def backward(
    gate, up, dy, dgate, dup, rows, D: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dgate and dup (rows d)."""
    WIDE: tl.constexpr = tl.float64 if dup.dtype.element_ty == tl.float64 else tl.float32
    at, to, here = place(gate, rows, D, ROWS, BLOCK)
    g = SCALE * tl.load(at, mask=here, other=0.0).to(WIDE)
    at, _, _ = place(up, rows, D, ROWS, BLOCK)
    u = tl.load(at, mask=here, other=0.0).to(WIDE)
    at, _, _ = place(dy, rows, D, ROWS, BLOCK)
    d = tl.load(at, mask=here, other=0.0).to(WIDE)
    open = sigmoid(g)
    tl.store(dup + to, (d * g * open).to(dup.dtype.element_ty), mask=here)
    slope = d * u * SCALE * (open * (1 + g * (1 - open)))
    tl.store(dgate + to, slope.to(dgate.dtype.element_ty), mask=here)
