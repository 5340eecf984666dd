"""The long convolution in Triton: what it can run, and its two passes.

Sequences whose circle fits a multiprocessor are one program a channel; longer ones go by ``triton_long.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, wrong_device
from ssmkernels.ops.fft_conv import triton_launch, triton_long
from ssmkernels.ops.fft_conv.triton_launch import Circle, circles_of, convolve, correlate, points_of

__all__ = ["backward", "forward", "missing", "offline_cases", "slow", "unsupported"]

MOST_PARTS = 4  # of a kernel up to which overlap-add is chosen by itself; each meets all of a sequence


def unsupported(a: Any) -> str | None:
    if a.u.dtype == torch.float64:
        return "float64"
    return wrong_device(a)


def slow(a: Any) -> str | None:
    most, length = MOST_PARTS * triton_launch.LARGEST, a.u.shape[1]
    ahead = 0 if a.kernel_reverse is None else a.kernel_reverse.shape[1]
    if min(a.kernel.shape[1], length) + min(ahead, length) <= most:
        return None
    return f"more than {most} taps, each {triton_launch.LARGEST} of which take a pass over the sequence"


def forward(a: Any, _: bool) -> Tensor:
    if a.u.numel() == 0:
        return a.u.new_empty(a.u.shape)
    return _convolve(a, _by_channel(a.u), _gate(a), adjoint=False)


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor]:
    if a.u.numel() == 0:
        return {name: torch.zeros_like(getattr(a, name)) for name in grads.wanted}
    found: dict[str, Tensor] = {}
    x, g, gate = _by_channel(a.u), _by_channel(grads.y), _gate(a)
    if "u" in grads.wanted:
        found["u"] = _convolve(a, g, gate, adjoint=True)
    if {"kernel", "D", "kernel_reverse"}.intersection(grads.wanted):
        short, long = _by_length(a)
        found |= correlate(short, a, x, g, gate)
        for place in long:
            parts = x[..., place], g[..., place], None if gate is None else gate[..., place]
            for name, gradient in triton_long.correlate(a, *parts).items():
                found[name] += gradient
    if "gate" in grads.wanted:
        found["gate"] = _convolve(a, x, g, adjoint=False)
    return found


def _convolve(a: Any, x: Tensor, gate: Tensor | None, adjoint: bool) -> Tensor:
    short, long = _by_length(a)
    y = convolve(short, a, x, gate, adjoint)
    for place in long:
        own = None if gate is None else gate[..., place]
        y[:, place] = triton_long.convolve(a, x[..., place], own, adjoint).mT
    return y


def _by_length(a: Any) -> tuple[list[Circle], list[slice]]:
    """The circles that there are kernels for, and where in time the other sequences lie; all of a batch are one."""
    short: list[Circle] = []
    long: list[slice] = []
    for circle in circles_of(a):
        if circle.points <= triton_launch.LARGEST:
            short.append(circle)
        else:
            spans = [(0, a.u.shape[1])] if circle.spans is None else circle.spans.tolist()
            long += [slice(start, end) for start, end in spans]
    return short, long


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
        (torch.float32, 8192, 1, False, False),  # as segments and parts are
        (torch.float32, 1024, 1024, False, True),
        (torch.bfloat16, 256, 256, True, True),
    ):
        how = ", packed, both sides" * whole + ", gated" * gated
        name = f"{str(dtype).removeprefix('torch.')}, length {length}, {taps} taps{how}"
        yield name, functools.partial(launches, dtype, length, taps, whole, gated)
