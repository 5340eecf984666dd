"""The long convolution in Triton, for circles that fit a multiprocessor: what it can run, and its place in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.library import operator_or_plain, wants_graph
from ssmkernels.core.triton_support import missing, wrong_device
from ssmkernels.ops.fft_conv import reference
from ssmkernels.ops.fft_conv.triton_launch import LARGEST, Circle, circles_of, convolve, correlate, points_of

__all__ = ["fft_conv", "missing", "offline_cases", "unsupported"]


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    u, kernel, reverse = arguments["u"], arguments["kernel"], arguments["kernel_reverse"]
    if u.dtype == torch.float64:
        return "float64"
    if points_of(u.shape[1], kernel, reverse) > LARGEST:
        packed = "" if arguments["cu_seqlens"] is None else ", for a packed sequence that is as long as all of them"
        return f"a circle of more than {2 * LARGEST} points{packed}"
    return wrong_device("u", u)


def fft_conv(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None,
    kernel_reverse: Tensor | None,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    run = operator_or_plain(conv, _conv, wants_graph(u, kernel, D, kernel_reverse, gate))
    return run(u, kernel, D, kernel_reverse, gate, cu_seqlens)


fft_conv.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _conv(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None,
    kernel_reverse: Tensor | None,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    if u.numel() == 0:
        return u.new_empty(u.shape)
    circles = circles_of(u, kernel, kernel_reverse, cu_seqlens)
    opening = None if gate is None else _by_channel(gate)
    return convolve(circles, _by_channel(u), kernel, D, kernel_reverse, opening, adjoint=False)


conv = torch.library.custom_op("ssmkernels::fft_conv_triton", _conv, mutates_args=())


@conv.register_fake
def _(u, kernel, D, kernel_reverse, gate, cu_seqlens):
    return u.new_empty(u.shape)


def _conv_backward(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None,
    kernel_reverse: Tensor | None,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    wants_u: bool,
    wants_weights: bool,
    wants_gate: bool,
) -> list[Tensor]:
    """The gradient of u; of the kernel, and of D and kernel_reverse where there are; of the gate: those wanted."""
    if u.numel() == 0:
        return _empty_gradients(u, kernel, D, kernel_reverse, gate, wants_u, wants_weights, wants_gate)
    circles = circles_of(u, kernel, kernel_reverse, cu_seqlens)
    x, g, opening = _by_channel(u), _by_channel(dy), None if gate is None else _by_channel(gate)
    found = [convolve(circles, g, kernel, D, kernel_reverse, opening, adjoint=True)] if wants_u else []
    if wants_weights:
        found += correlate(circles, x, g, kernel, D, kernel_reverse, opening)
    if wants_gate:
        found.append(convolve(circles, x, kernel, D, kernel_reverse, g, adjoint=False))
    return found


conv_backward = torch.library.custom_op("ssmkernels::fft_conv_triton_backward", _conv_backward, mutates_args=())


@conv_backward.register_fake
def _(u, kernel, D, kernel_reverse, gate, cu_seqlens, dy, wants_u, wants_weights, wants_gate):
    return _empty_gradients(u, kernel, D, kernel_reverse, gate, wants_u, wants_weights, wants_gate)


def _empty_gradients(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None,
    kernel_reverse: Tensor | None,
    gate: Tensor | None,
    wants_u: bool,
    wants_weights: bool,
    wants_gate: bool,
) -> list[Tensor]:
    """Zeros: all that is right without inputs, and shapes enough for a compiler."""
    weights = (kernel, D, kernel_reverse) if wants_weights else ()
    wanted = ((u,) if wants_u else ()) + weights + ((gate,) if wants_gate else ())
    return [w.new_zeros(w.shape) for w in wanted if w is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@twice_differentiable(lambda ctx: (reference.fft_conv, ctx.saved_tensors))
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wants_u, wants_weights, wants_gate = needed[0], any(needed[1:4]), needed[4]
    found = iter(conv_backward(*saved, dy, wants_u, wants_weights, wants_gate))
    wanted = (wants_u, *(wants_weights and w is not None for w in saved[1:4]), wants_gate)
    return (*(next(found) if one else None for one in wanted), None)


conv.register_autograd(_backward, setup_context=_setup_context)


def _by_channel(x: Tensor) -> Tensor:
    """(b l d) → (b d l) in memory: the tokens of a channel beside one another."""
    return x.mT.contiguous()


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, length: int, taps: int, whole: bool, gated: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, kernel = meta(1 if whole else 2, 8, length), meta(8, taps, dtype=torch.float32)
        D, reverse = (meta(8), meta(8, taps)) if whole else (None, None)
        spans, gate = meta(2, 2, dtype=torch.int32) if whole else None, x if gated else None
        circles = [Circle(points_of(length, kernel, reverse), length, 2, spans)]
        for adjoint in (False, True):
            convolve(circles, x, kernel, D, reverse, gate, adjoint)
        correlate(circles, x, x, kernel, D, reverse, gate)

    for dtype, length, taps, whole, gated in (
        (torch.float32, 4096, 4096, True, True),
        (torch.float32, 4096, 4096, True, False),
        (torch.bfloat16, 4096, 4096, False, False),
        (torch.float16, 8000, 100, True, False),
        (torch.float32, 1024, 1024, False, True),
        (torch.bfloat16, 256, 256, True, True),
    ):
        how = ", packed, both sides" * whole + ", gated" * gated
        name = f"{str(dtype).removeprefix('torch.')}, length {length}, {taps} taps{how}"
        yield name, functools.partial(launches, dtype, length, taps, whole, gated)
