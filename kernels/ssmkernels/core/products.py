"""Products with a weight matrix, by the faster of the two libraries that PyTorch ships for the CPU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Weights from which oneDNN's longer way to a call is worth it. On two cores it then takes 0.9 of the time of PyTorch's
# default library for many rows, 0.6 for one.
LARGE = 2**19


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x ``(..., in)``, weight ``(out, in)``, bias ``(out)`` → ``(..., out)``, as PyTorch's.

    PyTorch sends float32 products to whichever BLAS it was built with, and half precision to oneDNN, which serves
    float32 as well and reads a weight at memory speed where there is a single row. Large float32 products on a CPU take
    it too, where no gradient is wanted. ``torch.backends.mkldnn.enabled = False`` turns that off.
    """
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
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
        and bool(torch.backends.mkldnn.enabled)
        and _available()
    )


@functools.cache
def _available() -> bool:
    """Whether this PyTorch has oneDNN, with the product that its own compiler uses."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
