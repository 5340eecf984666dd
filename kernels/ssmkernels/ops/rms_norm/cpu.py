"""Root-mean-square normalisation in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, plain
from ssmkernels.ops.rms_norm import reference

__all__ = ["missing", "rms_norm", "unsupported"]

PARTS = 64  # of the sum over rows: as in cpu_backward.cpp


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    if x.device.type != "cpu":
        return f"its tensors must be on the CPU; `x` is on {x.device}"
    return "no channels" if x.shape[-1] == 0 else None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = (x, weight, gate, residual)
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    run = norm if graph or torch.compiler.is_compiling() else _norm
    return run(x, weight, eps, gate, norm_before_gate, group_size, residual)


rms_norm.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, summed = _outputs(x, weight, eps, gate, norm_before_gate, group_size, residual)
    values, _kept = _values(x, weight, eps, gate, norm_before_gate, group_size, residual)
    large_pages(y, summed)
    values |= {"y": y.data_ptr(), "summed": summed.data_ptr()}
    native.run("rms_norm", values)
    return y, summed


norm = torch.library.custom_op("ssmkernels::rms_norm_cpu", _norm, mutates_args=())


@norm.register_fake
def _outputs(x, weight, eps, gate, norm_before_gate, group_size, residual):
    summed = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format), summed


def _values(x, weight, eps, gate, norm_before_gate, group_size, residual) -> tuple[dict[str, Any], list[Any]]:
    """The kernel's arguments but for the outputs, and the tensors that they point into."""
    x, gate, residual = _lines(x), _lines(gate), _lines(residual)
    weight = plain(weight, precision(x))
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
        "group": group_size or d,
        "gate_first": not norm_before_gate,
        "threads": native.threads(4 * x.numel()),
        "x_row": x.stride(0),
        "gate_row": 0 if gate is None else gate.stride(0),
        "residual_row": 0 if residual is None else residual.stride(0),
        "eps": eps,
    }
    return values, [x, weight, gate, residual]


def _lines(x: Tensor | None) -> Tensor | None:
    """(..., d) → (rows, d) with the channels side by side."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@torch.library.custom_op("ssmkernels::rms_norm_cpu_backward", mutates_args=())
def norm_backward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int | None,
    summed: Tensor | None,
    dy: Tensor,
    dsummed: Tensor | None,
) -> list[Tensor]:
    """Gradients of x and weight, then of those of gate and residual that are given; ``summed`` is x + residual."""
    values, _kept = _values(x, weight, eps, gate, norm_before_gate, group_size, summed)
    dy_rows, dsummed_rows = _lines(dy), _lines(dsummed)
    assert dy_rows is not None
    wide, d = precision(x), x.shape[-1]
    parts = x.new_zeros((PARTS, d), dtype=wide)
    gradients = {
        "dx": x.new_empty(x.shape),
        "dweight": weight.new_empty(d, dtype=wide),
        "dgate": None if gate is None else gate.new_empty(gate.shape),
        "dresidual": None if summed is None else summed.new_empty(summed.shape),
    }
    large_pages(*gradients.values())
    values |= {"y": 0, "summed": 0} | {name: address(g) for name, g in gradients.items()}
    values |= {"dy": dy_rows.data_ptr(), "dsummed": address(dsummed_rows), "parts": parts.data_ptr()}
    values["dy_row"] = dy_rows.stride(0)
    values["dsummed_row"] = 0 if dsummed_rows is None else dsummed_rows.stride(0)
    native.run("rms_norm_backward", values)
    inputs = (x, weight, gate, summed)
    return [g.to(t.dtype) for g, t in zip(gradients.values(), inputs, strict=True) if g is not None and t is not None]


@norm_backward.register_fake
def _(x, weight, eps, gate, norm_before_gate, group_size, summed, dy, dsummed):
    return [t.new_empty(t.shape) for t in (x, weight, gate, summed) if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, ctx.eps, gate, ctx.norm_before_gate, ctx.group_size, residual = inputs
    ctx.save_for_backward(x, weight, gate, None if residual is None else output[1])


def _again(ctx: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    x, weight, gate, summed = ctx.saved_tensors
    residual = None if summed is None else summed - x  # its derivative by x is 0, and that by the residual is 1
    return reference.rms_norm, (x, weight, ctx.eps, gate, ctx.norm_before_gate, ctx.group_size, residual)


@twice_differentiable(_again)
def _backward(ctx: Any, dy: Tensor | None, dsummed: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, gate, summed = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    dsummed = None if summed is None else dsummed
    found = iter(norm_backward(x, weight, ctx.eps, gate, ctx.norm_before_gate, ctx.group_size, summed, dy, dsummed))
    dx, dweight, dgate, dresidual = (None if t is None else next(found) for t in (x, weight, gate, summed))
    return dx, dweight, None, dgate, None, None, dresidual


norm.register_autograd(_backward, setup_context=_setup_context)
