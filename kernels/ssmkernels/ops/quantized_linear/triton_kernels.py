"""The Triton kernel of linear maps with quantised weights.

A program has ``ROWS`` rows of x and ``OUTPUTS`` outputs, and goes through the inputs in blocks of 32, in which every
output has one scale and zero. The products are of whole numbers, which half precision holds exactly.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype changes where a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def forward(
    x,
    weight,
    scales,
    zeros,
    bias,
    y,
    x_row,
    rows,
    K: tl.constexpr,
    O: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """y (rows, O), of x as it is or, where SPAN is not 0, rounded in spans of so many inputs; offsets are 64-bit."""
    BLOCK: tl.constexpr = 32
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    of_row, of_output = row < rows, output < O
    within = tl.arange(0, BLOCK)
    half = x.dtype.element_ty
    if scales is None and weight.dtype.element_ty != half:
        half = tl.float32
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, K, BLOCK):
        inside = first + within < K
        from_x = x + row[:, None] * x_row + first + within[None, :]
        values = tl.load(from_x, mask=of_row[:, None] & inside[None, :], other=0.0)
        if SPAN:
            near = first // SPAN * SPAN + tl.arange(0, 128)
            span = of_row[:, None] & ((tl.arange(0, 128) < SPAN) & (near < K))[None, :]
            all_of_it = tl.load(x + row[:, None] * x_row + near[None, :], mask=span, other=0.0).to(tl.float32)
            scale_of_x = tl.maximum(tl.div_rn(tl.max(tl.abs(all_of_it), axis=1), 127.0), 2.0**-100)
            values = tl.div_rn(values.to(tl.float32), scale_of_x[:, None] + tl.zeros_like(values).to(tl.float32))
            values = values + 12582912.0 - 12582912.0  # 1.5 · 2²³: rounds to a whole number
        values = values.to(half)
        if PACKED:
            width: tl.constexpr = (K + BLOCK - 1) // BLOCK * (BLOCK // 2)
            place = weight + output[:, None] * width + first // 2 + within[None, :] % 16
            q = (tl.load(place, mask=of_output[:, None], other=0).to(tl.int32) >> (within[None, :] // 16 * 4)) & 15
            if zeros is None:
                q -= 8
            else:
                at = zeros + output * groups + first // GROUP
                q -= tl.load(at, mask=of_output, other=0).to(tl.int32)[:, None]
        else:
            place = weight + output[:, None] * K + first + within[None, :]
            q = tl.load(place, mask=of_output[:, None] & inside[None, :], other=0)
        product = tl.dot(values, tl.trans(q.to(tl.float32).to(half)), input_precision="ieee")
        if scales is not None:
            scale = tl.load(scales + output * groups + first // GROUP, mask=of_output, other=0.0).to(tl.float32)
            product *= scale[None, :]
        if SPAN:
            product *= scale_of_x[:, None]
        total += product
    if bias is not None:
        total += tl.load(bias + output, mask=of_output, other=0.0).to(tl.float32)[None, :]
    to = y + row[:, None] * O + output[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=of_row[:, None] & of_output[None, :])
