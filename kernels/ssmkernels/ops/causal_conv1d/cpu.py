"""The causal convolution and its step in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import gradient_wanted, precision
from ssmkernels.native import address, missing, rows
from ssmkernels.ops.causal_conv1d import reference

__all__ = ["causal_conv1d", "causal_conv1d_step", "missing", "step_unsupported", "unsupported"]


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    return None if x.device.type == "cpu" else f"its tensors must be on the CPU; `x` is on {x.device}"


def step_unsupported(arguments: Mapping[str, Any]) -> str | None:
    return gradient_wanted(arguments) or unsupported(arguments)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, initial_state))
    run = conv if graph or torch.compiler.is_compiling() else _conv
    return run(x, weight, bias, activation, initial_state, cu_seqlens)


causal_conv1d.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, final_state = _outputs(x, weight, bias, activation, initial_state, cu_seqlens)
    large_pages(y)
    values, _kept = _values(x, weight, bias, activation, initial_state, cu_seqlens)
    values |= {"y": y.data_ptr(), "final_state": final_state.data_ptr()}
    native.run("causal_conv1d", values)
    return y, final_state


conv = torch.library.custom_op("ssmkernels::causal_conv1d_cpu", _conv, mutates_args=())


@conv.register_fake
def _outputs(x, weight, bias, activation, initial_state, cu_seqlens):
    s = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty((s, weight.shape[1] - 1, x.shape[2]), dtype=precision(x))
    return x.new_empty(x.shape), state


def _values(x, weight, bias, activation, initial_state, cu_seqlens) -> tuple[dict[str, int], list[Any]]:
    """The kernel's arguments but for the outputs, and the tensors that they point into."""
    wide = precision(x)
    x, weight = rows(x), weight.to(wide).contiguous()
    bias = None if bias is None else bias.to(wide).contiguous()
    initial_state, cu_seqlens = (None if t is None else t.contiguous() for t in (initial_state, cu_seqlens))
    values = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "bias": address(bias),
        "initial": address(initial_state),
        "cu_seqlens": address(cu_seqlens),
        "dtype": native.DTYPES[x.dtype],
        "sequences": x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "length": x.shape[1],
        "d": x.shape[2],
        "width": weight.shape[1],
        "silu": activation == "silu",
        "threads": torch.get_num_threads(),
        "x_batch": x.stride(0),
        "x_time": x.stride(1),
    }
    return values, [x, weight, bias, initial_state, cu_seqlens]


@torch.library.custom_op("ssmkernels::causal_conv1d_cpu_backward", mutates_args=())
def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
) -> list[Tensor]:
    """Gradients of x and weight, then of those of bias and the initial state that are given."""
    wide = precision(x)
    values, _kept = _values(x, weight, bias, activation, initial_state, cu_seqlens)
    dy = rows(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()
    gradients = {
        "dx": x.new_empty(x.shape),
        "dweight": weight.new_empty(weight.shape, dtype=wide),
        "dbias": None if bias is None else bias.new_empty(bias.shape, dtype=wide),
        "dinitial": None if initial_state is None else initial_state.new_empty(initial_state.shape),
    }
    large_pages(gradients["dx"])
    values |= {name: address(g) for name, g in gradients.items()}
    values |= {"y": 0, "final_state": 0, "dy": dy.data_ptr(), "dfinal": address(dfinal)}
    values |= {"dy_batch": dy.stride(0), "dy_time": dy.stride(1)}
    native.run("causal_conv1d_backward", values)
    inputs = (x, weight, bias, initial_state)
    return [g.to(t.dtype) for g, t in zip(gradients.values(), inputs, strict=True) if g is not None and t is not None]


@conv_backward.register_fake
def _(x, weight, bias, activation, initial_state, cu_seqlens, dy, dfinal):
    return [t.new_empty(t.shape) for t in (x, weight, bias, initial_state) if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.activation, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def _again(ctx: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    return reference.causal_conv1d, (x, weight, bias, ctx.activation, initial_state, cu_seqlens)


@twice_differentiable(_again)
def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    found = iter(conv_backward(x, weight, bias, ctx.activation, initial_state, cu_seqlens, dy, dfinal))
    dx, dweight, dbias, dinitial = (None if t is None else next(found) for t in (x, weight, bias, initial_state))
    return dx, dweight, dbias, None, dinitial, None


conv.register_autograd(_backward, setup_context=_setup_context)


def causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    run = step if torch.compiler.is_compiling() else _step
    return run(state, x, weight, bias, activation)


def _step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    wide = precision(x)
    own = state if state.is_contiguous() else state.contiguous()
    x, weight = rows(x), weight.to(wide).contiguous()
    bias = None if bias is None else bias.to(wide).contiguous()
    y = x.new_empty(x.shape)
    batch, d = x.shape
    native.run(
        "causal_conv1d_step",
        {
            "state": own.data_ptr(),
            "x": x.data_ptr(),
            "weight": weight.data_ptr(),
            "bias": address(bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "batch": batch,
            "d": d,
            "width": weight.shape[1],
            "silu": activation == "silu",
            "threads": native.threads(x.numel() * 4),
            "x_batch": x.stride(0),
        },
    )
    if own is not state:
        state.copy_(own)
    return y


step = torch.library.custom_op("ssmkernels::causal_conv1d_step_cpu", _step, mutates_args=("state",))


@step.register_fake
def _(state, x, weight, bias, activation):
    return x.new_empty(x.shape)
