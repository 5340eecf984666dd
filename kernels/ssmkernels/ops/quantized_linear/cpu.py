"""A linear map with quantised weights in the native CPU library (``cpu.cpp``).

A few rows are multiplied by the weights as they lie in memory. For more the weights are dequantised, a tile of outputs
after another, for the product of float32 matrices, unless one of half precision is faster. In float64 all are
PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import HALF
from ssmkernels.native import address, missing, plain, rows, wrong_device
from ssmkernels.native.calls import NotPreparedError
from ssmkernels.native.prepared import Prepared
from ssmkernels.native.products import in_half, linear
from ssmkernels.ops.quantized_linear.reference import inputs
from ssmkernels.ops.quantized_linear.tiled import as_rows, by_tiles, gradients, plain_weights

__all__ = ["backward", "forward", "missing", "prepared", "unsupported"]

FEW = 16  # rows, for which each weight is read once
KINDS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4, torch.uint8: 5}


def unsupported(a: Any) -> str | None:
    return wrong_device(a) or ("no inputs, outputs or rows" if 0 in (*a.x.shape, a.weight.shape[0]) else None)


def forward(a: Any, _: bool) -> Tensor:
    if _double(a):
        return by_tiles(a, inputs(a), plain_weights, torch.matmul)
    if a.x.numel() <= FEW * a.x.shape[-1]:
        return prepared(a).run()
    if a.scales is None and a.weight.dtype == a.x.dtype and a.x.dtype in HALF:
        y = in_half(a.x, a.weight, None if a.bias is None else plain(a.bias, torch.float32))
        if y is not None:
            return y
    return by_tiles(a, _inputs(a), _dequantized, _product)


def backward(a: Any, _: Any, grads: Any) -> dict[str, Any]:
    return gradients(a, grads, plain_weights if _double(a) else _dequantized, torch.matmul)


def _double(a: Any) -> bool:
    """Whether there is float64 in the call, which the kernels do not read."""
    return torch.float64 in (a.x.dtype, a.weight.dtype)


def prepared(a: Any) -> Prepared:
    """The kernel's call, for any number of rows.

    Raises:
        NotPreparedError: there is float64 in it.
    """
    if _double(a):
        raise NotPreparedError("quantized_linear")
    x = rows(a.x)
    x = x if x.ndim == 2 else as_rows(x)
    bias = None if a.bias is None else plain(a.bias, torch.float32)
    (y,) = a.declared.outputs(a)
    fields, kept = _weight(a)
    return Prepared(
        "quantized_linear",
        fields
        | {
            "x": x.data_ptr(),
            "bias": address(bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "rows": x.shape[0],
            "x_row": x.stride(0),
            "threads": native.threads(a.weight.shape[0] * x.shape[1]),
            "rounded": a.activations is not None,
        },
        (x, bias, *kept),
        y,
    )


def _dequantized(a: Any) -> Tensor:
    fields, _kept = _weight(a)
    to = a.x.new_empty(a.weight.shape[0], a.x.shape[-1], dtype=torch.float32)
    native.run("dequantize", fields | {"to": to.data_ptr(), "threads": native.threads(to.numel())})
    return to


def _inputs(a: Any) -> Tensor:
    """x in float32, rounded if it shall be."""
    if a.activations is None:
        return inputs(a)
    x = as_rows(rows(a.x))
    to = x.new_empty(x.shape, dtype=torch.float32)
    native.run(
        "round_inputs",
        {
            "x": x.data_ptr(),
            "to": to.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "rows": x.shape[0],
            "x_row": x.stride(0),
            "size": x.shape[1],
            "group": a.group_size or x.shape[1],
            "threads": native.threads(x.numel()),
        },
    )
    return to


def _product(x: Tensor, columns: Tensor) -> Tensor:
    return linear(x, columns.T)


def _weight(a: Any) -> tuple[dict[str, float], list[Tensor | None]]:
    """The weight as kernels take it, and the tensors that it points into."""
    size = a.x.shape[-1]
    weight, scales, zeros = (None if t is None else t.contiguous() for t in (a.weight, a.scales, a.zeros))
    fields: dict[str, float] = {
        "weight": address(weight),
        "scales": address(scales),
        "zeros": address(zeros),
        "kind": KINDS[a.weight.dtype],
        "scales_dtype": 0 if scales is None else native.DTYPES[scales.dtype],
        "outputs": a.weight.shape[0],
        "size": size,
        "group": a.group_size or size,
    }
    return fields, [weight, scales, zeros]
