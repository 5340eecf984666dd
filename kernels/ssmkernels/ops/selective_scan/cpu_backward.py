"""The native selective scan's backward pass (``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, rows
from ssmkernels.ops.selective_scan.cpu_arguments import kernel, numbers, reals, values

_FIELDS = {"initial_state": "dinitial"}  # of Backward, where it has other names


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor]:
    """The kernel's gradients of complex numbers are Wirtinger's d/dx; PyTorch's are their conjugates."""
    wide, dtype = precision(a.u), numbers(a.u, a.A)
    fields, _kept = values(a, saved.starts)
    dy, dfinal = rows(grads.y), grads.final_state
    dfinal = None if dfinal is None else reals(dfinal.resolve_conj().conj_physical()).contiguous()

    def empty(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_empty(x.shape)

    def zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.new_zeros(x.shape, dtype=dtype)

    found: dict[str, Any] = {
        "u": empty(a.u),
        "delta": empty(a.delta),
        "A": zeros(a.A, dtype),
        "B": zeros(a.B, dtype),
        "C": zeros(a.C, dtype),
        "D": zeros(a.D, wide),
        "z": empty(a.z),
        "delta_bias": zeros(a.delta_bias, wide),
        "initial_state": empty(a.initial_state),
    }
    large_pages(found["u"], found["delta"], found["z"])
    fields |= {_FIELDS.get(name, "d" + name): address(g) for name, g in found.items()}
    fields |= {"y": 0, "final_state": 0, "dy": dy.data_ptr(), "dfinal": address(dfinal)}
    fields["dy_batch"], fields["dy_time"] = dy.stride()[:2]
    native.run(kernel(a.A, "_backward"), fields)
    if dtype.is_complex:
        found["C"] *= 2  # as in maps
    return {name: _gradient(g, getattr(a, name)) for name, g in found.items() if g is not None}


def _gradient(g: Tensor, x: Tensor) -> Tensor:
    """x's gradient in x's dtype."""
    if not g.is_complex():
        return g.to(x.dtype)
    return g.conj_physical_() if x.is_complex() else g.real.to(x.dtype).contiguous()
