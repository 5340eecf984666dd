"""Whether the native library may take the place of one of PyTorch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmkernels import native
from ssmkernels.core import finite, forcing
from ssmkernels.core.memory import large_pages
from ssmkernels.core.plain import why_not_plain
from ssmkernels.core.validate import HALF

SHARED = 2**15  # numbers from which PyTorch's elementwise operators start their team of threads


def float32(*tensors: Tensor) -> bool:
    """Whether all are float32 and :func:`ordinary`."""
    return ordinary(torch.float32, *tensors)


def ordinary(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether all are ordinary tensors of a dtype on the CPU, in eager mode, with nobody watching PyTorch's operators.

    Quantised and distributed tensors have operators of their own, PyTorch puts off the sign of such views as
    ``x.conj().imag``, autocast chooses the dtype, and modes such as one that counts FLOPs know PyTorch's operators
    alone.
    """
    return (
        all(x.dtype == dtype and type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)
        and not torch.compiler.is_compiling()
        and not any(x.is_neg() for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
    )


def reachable(**tensors: Tensor | None) -> bool:
    """Whether the native library is there and may read and write the memory of these tensors."""
    return not why_not_plain(tensors) and native.missing() is None


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def finite_exp(x: Tensor) -> Tensor:
    """:func:`ssmkernels.core.finite.finite_exp` within 2 ulp.

    PyTorch's library starts its team of threads from a few thousand numbers on, such as a Mamba layer's A, and these
    keep their cores busy for milliseconds afterwards. Float32 tensors without gradients go to the native library.
    """
    if not (float32(x) and x.is_contiguous() and not wants_gradient(x) and reachable(x=x)):
        return finite.finite_exp(x)
    y = torch.empty_like(x)
    values = {"x": x.data_ptr(), "y": y.data_ptr(), "count": x.numel(), "threads": native.threads(x.numel())}
    native.run("exp", values)
    return y


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, for a residual stream x ``(..., d)`` and what a layer adds to it.

    PyTorch's library starts its team of threads for as few numbers as a layer's, whose members wait for each other, and
    first makes a copy of a y in half precision. Large contiguous tensors of one shape without gradients go to the
    native library, where y has x's dtype or x is float32.
    """
    if not (
        not torch.compiler.is_compiling()
        and x.numel() >= SHARED
        and x.shape == y.shape
        and x.dtype in (torch.float32, y.dtype)
        and (y.dtype in HALF or y.dtype == torch.float32)
        and x.is_contiguous()
        and y.is_contiguous()
        and not wants_gradient(x, y)
        and ordinary(x.dtype, x)
        and ordinary(y.dtype, y)
        and reachable(x=x, y=y)
    ):
        return x + y
    total = torch.empty_like(x)
    large_pages(total)
    values: dict[str, float] = {"x": x.data_ptr(), "y": y.data_ptr(), "sum": total.data_ptr(), "count": x.numel()}
    values |= {"dtype": native.DTYPES[x.dtype], "y_dtype": native.DTYPES[y.dtype], "threads": native.threads(x.numel())}
    native.run("add", values)
    return total


def rms_norm_in_half(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """:func:`ssmkernels.rms_norm` of a float32 stream x ``(..., d)`` for layers in half precision, the weight's dtype.

    Results are rounded as they are written, to the same bits as all of them afterwards, which is one more pass over
    memory by PyTorch's team of threads.

    Returns:
        ``(..., d)`` in the weight's dtype, or None where PyTorch's own operators have a say.
    """
    if not (
        not torch.compiler.is_compiling()
        and weight.dtype in HALF
        and x.numel() > 0
        and x.shape[-1:] == weight.shape
        and x.is_contiguous()
        and not wants_gradient(x, weight)
        and float32(x)
        and ordinary(weight.dtype, weight)
        and forcing.unforced()
        and reachable(x=x, weight=weight)
    ):
        return None
    d = x.shape[-1]
    wide = native.plain(weight, torch.float32)
    y = torch.empty_like(x, dtype=weight.dtype)
    large_pages(y)
    values: dict[str, float] = dict.fromkeys(("x", "gate", "summed", "gate_first", "x_row", "gate_row"), 0)
    values |= {"residual": x.data_ptr(), "residual_row": d, "residual_wide": True, "weight": wide.data_ptr()}
    values |= {"y": y.data_ptr(), "dtype": native.DTYPES[y.dtype], "rows": x.numel() // d, "d": d, "group": d}
    native.run("rms_norm", values | {"eps": eps, "threads": native.threads(4 * x.numel())})
    return y
