"""The kernel of a diagonal state-space model in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.native import missing
from ssmkernels.ops.diagonal_kernel.modes import powers_summed, sum_of_powers

__all__ = ["diagonal_kernel", "missing", "unsupported"]

# Blocks that one task of the backward pass takes, and the least taps of a block: kSpan and kLeast in cpu.h.
SPAN, LEAST = 96, 64


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    A = arguments["A"]
    if A.device.type != "cpu":
        return f"its tensors must be on the CPU; `A` is on {A.device}"
    if A.numel() == 0:
        return "no channels or no states"
    return None


def diagonal_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    return sum_of_powers(_Taps.apply, A, B, C, dt, length, discretization)


class _Taps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ratio: Tensor, weight: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ratio, weight)
        ctx.constants = length, dtype
        ratio, weight = _plain(ratio, weight)
        taps = ratio.new_empty((ratio.shape[0], length), dtype=dtype)
        native.run("diagonal_kernel", _values(ratio, weight, taps))
        return taps

    @staticmethod
    @twice_differentiable(lambda ctx: (powers_summed, (*ctx.saved_tensors, *ctx.constants)))
    def backward(ctx: Any, dtaps: Tensor) -> tuple[Tensor | None, ...]:
        ratio, weight = _plain(*ctx.saved_tensors)
        dtaps = dtaps.contiguous()
        parts = [ratio.new_empty((_spans(dtaps.shape[1]), *ratio.shape)) for _ in range(2)]
        gradients = {"dratio": parts[0].data_ptr(), "dweight": parts[1].data_ptr()}
        native.run("diagonal_kernel_backward", _values(ratio, weight, dtaps) | gradients)
        return (*(p.sum(0) for p in parts), None, None)


def _plain(*tensors: Tensor) -> list[Tensor]:
    return [x.resolve_conj().contiguous() for x in tensors]


def _values(ratio: Tensor, weight: Tensor, taps: Tensor) -> dict[str, int]:
    """The kernel's arguments."""
    d, n = ratio.shape
    return {
        "ratio": ratio.data_ptr(),
        "weight": weight.data_ptr(),
        "taps": taps.data_ptr(),
        "dtype": native.DTYPES[taps.dtype],
        "complex": ratio.is_complex(),
        "length": taps.shape[1],
        "d": d,
        "n": n,
        "threads": native.threads(taps.numel() * n),
    }


def _spans(length: int) -> int:
    block = LEAST
    while block * block < length:
        block *= 2
    return -(-length // (block * SPAN))
