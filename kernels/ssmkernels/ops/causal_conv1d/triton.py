"""The causal convolution in Triton: the kernels' launches, and their places in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.triton_support import (
    all_registers,
    kernels,
    missing,
    next_power_of_2,
    on_device_of,
    owners,
    wrong_device,
)
from ssmkernels.core.validate import gradient_wanted, precision
from ssmkernels.ops.causal_conv1d import reference

__all__ = ["causal_conv1d", "causal_conv1d_step", "missing", "offline_cases", "step_unsupported", "unsupported"]

WIDEST = 16  # taps are unrolled


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    if arguments["weight"].shape[1] > WIDEST:
        return f"a width of more than {WIDEST}"
    return wrong_device("x", arguments["x"])


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


def causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    run = step if torch.compiler.is_compiling() else _step
    return run(state, x, weight, bias, activation)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, final_state = _outputs(x, weight, bias, activation, initial_state, cu_seqlens)
    programs, values, options = _launch(x, weight, bias, activation, initial_state, cu_seqlens, forward=True)
    if programs:
        with on_device_of(x):
            kernels(__package__).forward[(programs,)](**values, y=y, final=final_state, **options)
    return y, final_state


conv = torch.library.custom_op("ssmkernels::causal_conv1d_triton", _conv, mutates_args=())


@conv.register_fake
def _outputs(x, weight, bias, activation, initial_state, cu_seqlens):
    s = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((s, weight.shape[1] - 1, x.shape[2]), dtype=precision(x))


def _conv_backward(
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
    programs, values, options = _launch(x, weight, bias, activation, initial_state, cu_seqlens, forward=False)
    d, w = weight.shape
    dx = x.new_empty(x.shape)
    dinitial = None if initial_state is None else x.new_empty(initial_state.shape, dtype=initial_state.dtype)
    tiles = programs // options["d_blocks"] if programs else 0
    parts = x.new_empty((tiles, w + 1, d), dtype=precision(x))
    if programs:
        values |= {
            "dy": dy,
            "dfinal": None if dfinal is None else dfinal.contiguous(),
            "dx": dx,
            "dinitial": dinitial,
            "dweights": parts,
        }
        values |= dict(zip(("dy_batch", "dy_time", "dy_d"), dy.stride(), strict=True))
        with on_device_of(x):
            kernels(__package__).backward[(programs,)](**values, **options)
    total = parts.sum(0)
    gradients = [dx, total[:w].T.to(weight.dtype, memory_format=torch.contiguous_format, copy=True)]
    if bias is not None:
        gradients.append(total[w].to(bias.dtype, copy=True))
    return gradients if dinitial is None else [*gradients, dinitial]


conv_backward = torch.library.custom_op("ssmkernels::causal_conv1d_triton_backward", _conv_backward, mutates_args=())


@conv_backward.register_fake
def _(x, weight, bias, activation, initial_state, cu_seqlens, dy, dfinal):
    return [t.new_empty(t.shape) for t in (x, weight, bias, initial_state) if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.activation, initial_state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def _again(ctx: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    return reference.causal_conv1d, (x, weight, bias, ctx.activation, initial_state, cu_seqlens)


@twice_differentiable(_again)
def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(x.shape)
    found = iter(conv_backward(x, weight, bias, ctx.activation, initial_state, cu_seqlens, dy, dfinal))
    dx, dweight, dbias, dinitial = (None if t is None else next(found) for t in (x, weight, bias, initial_state))
    return dx, dweight, dbias, None, dinitial, None


conv.register_autograd(_backward, setup_context=_setup_context)


def _step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = x.new_empty(x.shape)
    b, d = x.shape
    block = _block(d)
    d_blocks = -(-d // block)
    if y.numel():
        with on_device_of(x):
            kernels(__package__).step[(b * d_blocks,)](
                state,
                x,
                weight,
                bias,
                y,
                *state.stride(),
                *x.stride(),
                *weight.stride(),
                0 if bias is None else bias.stride(0),
                d,
                d_blocks,
                W=weight.shape[1],
                SILU=activation == "silu",
                BLOCK_D=block,
                num_warps=_warps(block, 1),
            )
    return y


step = torch.library.custom_op("ssmkernels::causal_conv1d_step_triton", _step, mutates_args=("state",))


@step.register_fake
def _(state, x, weight, bias, activation):
    return x.new_empty(x.shape)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    forward: bool,
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The number of programs, what both kernels take of the arguments, and how they are laid out."""
    b, length, d = x.shape
    w = weight.shape[1]
    block = _block(d)
    T = 16 if w <= 4 and x.dtype != torch.float64 else 8
    d_blocks = -(-d // block)
    tiles = max(1, -(-length // T))
    owner = None if cu_seqlens is None else owners(cu_seqlens, length, T)
    programs = d_blocks * (b * tiles if owner is None else len(owner))
    values: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "initial": initial_state,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "owners": owner,
        "bias_d": 0 if bias is None else bias.stride(0),
    }
    initial_strides = (0, 0, 0) if initial_state is None else initial_state.stride()
    values |= dict(zip(("x_batch", "x_time", "x_d"), x.stride(), strict=True))
    values |= dict(zip(("weight_d", "weight_w"), weight.stride(), strict=True))
    values |= dict(zip(("initial_s", "initial_time", "initial_d"), initial_strides, strict=True))
    options = {
        "length": length,
        "tiles": tiles,
        "d": d,
        "d_blocks": d_blocks,
        "W": w,
        "SILU": activation == "silu",
        "T": T,
        "BLOCK_D": block,
        **all_registers(),
        "num_warps": _warps(block, 2 if forward and x.dtype != torch.float64 else 1),
    }
    return programs, values, options


def _block(d: int) -> int:
    """Channels of a program."""
    return min(128, next_power_of_2(d))


def _warps(block: int, channels: int) -> int:
    """Warps of 32 threads with so many channels each."""
    return max(1, block // (32 * channels))


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, w: int, packed: bool, plain: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, weight, wide = meta(1, 64, 512), meta(512, w), precision(meta(1))
        bias, initial = (None, None) if plain else (meta(512), meta(3 if packed else 1, w - 1, 512, dtype=wide))
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        arguments = (x, weight, bias, None if plain else "silu", initial, cu_seqlens)
        _, final = _conv(*arguments)
        _conv_backward(*arguments, x, None if plain else final)
        _step(meta(1, w - 1, 512, dtype=wide), x[:, 0], weight, bias, None if plain else "silu")

    for dtype, w, packed, plain in (
        (torch.float32, 4, False, False),
        (torch.bfloat16, 4, True, False),
        (torch.float16, 2, False, True),
        (torch.float64, 4, False, False),
        (torch.float32, 7, False, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, width {w}" + ", packed" * packed + ", plain" * plain
        yield name, functools.partial(launches, dtype, w, packed, plain)
