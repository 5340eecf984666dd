"""Whether the native library may take the place of one of PyTorch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmkernels import native
from ssmkernels.core import finite
from ssmkernels.core.plain import why_not_plain


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
