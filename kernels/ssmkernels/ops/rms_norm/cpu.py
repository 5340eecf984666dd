"""Root-mean-square normalisation in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, lines, missing, plain, wrong_device
from ssmkernels.native.prepared import Prepared

__all__ = ["DROPS", "SAVES", "backward", "forward", "missing", "prepared", "restore", "unsupported"]

PARTS = 64  # of the sum over rows: as in cpu_backward.cpp

# The backward pass takes the sum x + residual, and not the residual.
SAVES, DROPS = ("summed",), ("residual",)


def unsupported(a: Any) -> str | None:
    return wrong_device(a) or ("no channels" if a.x.shape[-1] == 0 else None)


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    y = a.x.new_empty(a.x.shape)
    summed = a.x.new_empty(0, dtype=precision(a.x)) if a.residual is None else a.residual.new_empty(a.residual.shape)
    values, _kept = _values(a, a.residual)
    large_pages(y, summed)
    values |= {"y": y.data_ptr(), "summed": summed.data_ptr()}
    native.run("rms_norm", values)
    return y, summed


def prepared(a: Any) -> Prepared:
    """The kernel's call; with a residual, the sum takes its place."""
    values, kept = _values(a, a.residual)
    y = a.x.new_empty(a.x.shape)
    return Prepared("rms_norm", values | {"y": y.data_ptr(), "summed": address(a.residual)}, tuple(kept), y)


def restore(a: Any, saved: Any) -> Any:
    """The arguments with the residual: its derivative by x is 0, and that by the residual is 1."""
    # Without a residual the sum is empty
    return a._replace(residual=saved.summed - a.x) if saved.summed.shape == a.x.shape else a


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Any]:
    summed = saved.summed if saved.summed.shape == a.x.shape else None
    values, _kept = _values(a, summed)
    dy, dsummed = lines(grads.y), None if summed is None else lines(grads.summed)
    wide, d = precision(a.x), a.x.shape[-1]
    parts = a.x.new_zeros((PARTS, d), dtype=wide)
    found = {
        "x": a.x.new_empty(a.x.shape),
        "weight": a.weight.new_empty(d, dtype=wide),
        "gate": None if a.gate is None else a.gate.new_empty(a.gate.shape),
        "residual": None if summed is None else summed.new_empty(summed.shape),
    }
    large_pages(*found.values())
    values |= {"y": 0, "summed": 0} | {f"d{name}": address(g) for name, g in found.items()}
    values |= {"dy": dy.data_ptr(), "dsummed": address(dsummed), "parts": parts.data_ptr()}
    values["dy_row"] = dy.stride(0)
    values["dsummed_row"] = 0 if dsummed is None else dsummed.stride(0)
    native.run("rms_norm_backward", values)
    return found


def _values(a: Any, residual: Tensor | None) -> tuple[dict[str, Any], list[Any]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    x, gate, residual = lines(a.x), lines(a.gate), lines(residual)
    weight = plain(a.weight, precision(x))
    rows, d = x.shape
    values = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "gate": address(gate),
        "residual": address(residual),
        "dtype": native.DTYPES[x.dtype],
        "residual_wide": residual is not None and residual.dtype != x.dtype,
        "rows": rows,
        "d": d,
        "group": a.group_size or d,
        "gate_first": not a.norm_before_gate,
        "threads": native.threads(4 * x.numel()),
        "x_row": x.stride(0),
        "gate_row": 0 if gate is None else gate.stride(0),
        "residual_row": 0 if residual is None else residual.stride(0),
        "eps": a.eps,
    }
    return values, [x, weight, gate, residual]
