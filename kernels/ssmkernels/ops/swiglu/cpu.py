"""The gated product in the native CPU library (``cpu.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.native import missing
from ssmkernels.native import wrong_device as unsupported

__all__ = ["backward", "forward", "missing", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    y = a.gate.new_empty(a.gate.shape)
    large_pages(y)
    values, _kept = _values(a)
    native.run("swiglu", values | {"y": y.data_ptr()})
    return y


def backward(a: Any, _: Any, grads: Any) -> dict[str, Any]:
    found = {"gate": a.gate.new_empty(a.gate.shape), "up": a.gate.new_empty(a.gate.shape)}
    large_pages(*found.values())
    values, _kept = _values(a)
    dy = _lines(grads.y)
    values |= {"y": 0, "dy": dy.data_ptr(), "dy_row": dy.stride(0)}
    native.run("swiglu_backward", values | {f"d{name}": gradient.data_ptr() for name, gradient in found.items()})
    return found


def _values(a: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    gate, up = _lines(a.gate), _lines(a.up)
    rows, d = gate.shape
    values = {
        "gate": gate.data_ptr(),
        "up": up.data_ptr(),
        "dtype": native.DTYPES[gate.dtype],
        "rows": rows,
        "d": d,
        "gate_row": gate.stride(0),
        "up_row": up.stride(0),
        "threads": native.threads(8 * gate.numel()),
        "scale": a.scale,
    }
    return values, [gate, up]


def _lines(x: Tensor) -> Tensor:
    """(..., d) → (rows, d) with the channels side by side."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1]) if x.ndim != 2 else x
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
