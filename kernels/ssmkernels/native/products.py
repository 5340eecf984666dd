"""Products with a weight matrix, by the fastest that there is on the CPU for their size."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import native
from ssmkernels.core.plain import why_not_plain

# Weights from which oneDNN's longer way to a call is worth it. On two cores it then takes 0.9 of the time of PyTorch's
# default library for many rows.
LARGE = 2**19
FEW = 1  # rows, for which the native library reads the weight at memory speed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x ``(..., in)``, weight ``(out, in)``, bias ``(out)`` → ``(..., out)``, as PyTorch's.

    PyTorch sends float32 products to whichever BLAS it was built with. Large float32 products on a CPU go elsewhere,
    where no gradient is wanted: those of one row, as in decoding, to the native library, whose threads a busy machine
    does not hold up; others to oneDNN. ``torch.backends.mkldnn.enabled = False`` turns oneDNN off.
    """
    if _large(x, weight):
        if x.numel() == x.shape[-1] * FEW and _native(x, weight, bias):
            return _few_rows(x, weight, bias)
        if torch.backends.mkldnn.enabled and _available():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _large(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.numel() >= LARGE
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)  # a quantised weight, say, has a product of its own
        and type(x) is Tensor
        and x.shape[-1] == weight.shape[1]  # or else PyTorch has the clearer error
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()  # a mode, such as one that counts FLOPs, knows F.linear alone
        and not torch._C._len_torch_function_stack()
    )


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the native library may do it."""
    return (
        weight.is_contiguous()
        and weight.device.type == "cpu"
        and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1] and bias.device == x.device))
        and not why_not_plain({"x": x, "weight": weight, "bias": bias})
        and native.missing() is None
    )


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, size = weight.shape
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    native.run(
        "product",
        {
            "x": x.data_ptr(),
            "weight": weight.data_ptr(),
            "bias": native.address(bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "rows": x.numel() // size,
            "size": size,
            "outputs": outputs,
            "threads": native.threads(weight.numel()),
        },
    )
    return y


@functools.cache
def _available() -> bool:
    """Whether this PyTorch has oneDNN, with the product that its own compiler uses."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
