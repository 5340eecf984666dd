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

_FORWARD = "ratio weight taps dtype complex length d n threads"

_Forward = native.arguments("_Forward", _FORWARD)
_Backward = native.arguments("_Backward", _FORWARD + " dratio dweight")


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
        native.run("diagonal_kernel", _Forward(*_values(ratio, weight, taps)))
        return taps

    @staticmethod
    @twice_differentiable(lambda ctx: (powers_summed, (*ctx.saved_tensors, *ctx.constants)))
    def backward(ctx: Any, dtaps: Tensor) -> tuple[Tensor | None, ...]:
        ratio, weight = _plain(*ctx.saved_tensors)
        dtaps = dtaps.contiguous()
        parts = [ratio.new_empty((_spans(dtaps.shape[1]), *ratio.shape)) for _ in range(2)]
        native.run(
            "diagonal_kernel_backward", _Backward(*_values(ratio, weight, dtaps), *(p.data_ptr() for p in parts))
        )
        return (*(p.sum(0) for p in parts), None, None)


def _plain(*tensors: Tensor) -> list[Tensor]:
    return [x.resolve_conj().contiguous() for x in tensors]


def _values(ratio: Tensor, weight: Tensor, taps: Tensor) -> list[int]:
    """The fields of ``_Forward``."""
    d, n, length = *ratio.shape, taps.shape[1]
    addresses = [x.data_ptr() for x in (ratio, weight, taps)]
    sizes = [native.DTYPES[taps.dtype], ratio.is_complex(), length, d, n]
    return [*addresses, *sizes, native.threads(taps.numel() * n)]


def _spans(length: int) -> int:
    block = LEAST
    while block * block < length:
        block *= 2
    return -(-length // (block * SPAN))
