"""The gated product in the native CPU library (``cpu.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.native import lines, missing
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
    dy = lines(grads.y)
    values |= {"y": 0, "dy": dy.data_ptr(), "dy_row": dy.stride(0)}
    native.run("swiglu_backward", values | {f"d{name}": gradient.data_ptr() for name, gradient in found.items()})
    return found


def _values(a: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    gate, up = lines(a.gate), lines(a.up)
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
