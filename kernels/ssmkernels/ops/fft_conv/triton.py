"""The long convolution in Triton, for circles that fit a multiprocessor: what it can run, and its two passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, wrong_device
from ssmkernels.ops.fft_conv.triton_launch import LARGEST, Circle, circles_of, convolve, correlate, points_of

__all__ = ["backward", "forward", "missing", "offline_cases", "unsupported"]


def unsupported(a: Any) -> str | None:
    if a.u.dtype == torch.float64:
        return "float64"
    if points_of(a.u.shape[1], a) > LARGEST:
        packed = "" if a.cu_seqlens is None else ", for a packed sequence that is as long as all of them"
        return f"a circle of more than {2 * LARGEST} points{packed}"
    return wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    if a.u.numel() == 0:
        return a.u.new_empty(a.u.shape)
    return convolve(circles_of(a), a, _by_channel(a.u), _gate(a), adjoint=False)


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor]:
    if a.u.numel() == 0:
        return {name: torch.zeros_like(getattr(a, name)) for name in grads.wanted}
    circles, found = circles_of(a), {}
    x, g, gate = _by_channel(a.u), _by_channel(grads.y), _gate(a)
    if "u" in grads.wanted:
        found["u"] = convolve(circles, a, g, gate, adjoint=True)
    if {"kernel", "D", "kernel_reverse"}.intersection(grads.wanted):
        found |= correlate(circles, a, x, g, gate)
    if "gate" in grads.wanted:
        found["gate"] = convolve(circles, a, x, g, adjoint=False)
    return found


def _gate(a: Any) -> Tensor | None:
    return None if a.gate is None else _by_channel(a.gate)


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
        a = OPS["fft_conv"].declared.Arguments(x.mT, kernel, D, reverse, gate, None)
        circles = [Circle(points_of(length, a), length, 2, spans)]
        for adjoint in (False, True):
            convolve(circles, a, x, gate, adjoint)
        correlate(circles, a, x, x, gate)

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
