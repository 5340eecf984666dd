"""The kernel of a diagonal state-space model in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.gradient import with_gradient
from ssmkernels.native import missing, wrong_device
from ssmkernels.ops.diagonal_kernel.modes import Powers, powers_summed, sum_of_powers

__all__ = ["compute", "missing", "unsupported"]

# Blocks that one task of the backward pass takes, and the least taps of a block: kSpan and kLeast in cpu.h.
SPAN, LEAST = 96, 64

_FORWARD = "ratio weight taps dtype complex length d n threads"

_Forward = native.arguments("_Forward", _FORWARD)
_Backward = native.arguments("_Backward", _FORWARD + " dratio dweight")


def unsupported(a: Any) -> str | None:
    return wrong_device(a) or ("no channels or no states" if a.A.numel() == 0 else None)


def compute(a: Any) -> Tensor:
    return sum_of_powers(_taps, a)


def _forward(a: Powers) -> Tensor:
    a = _plain(a)
    taps = a.ratio.new_empty((a.ratio.shape[0], a.length), dtype=a.dtype)
    native.run("diagonal_kernel", _Forward(*_values(a, taps)))
    return taps


def _backward(a: Powers, dtaps: Tensor, _: set[str]) -> dict[str, Tensor]:
    a, dtaps = _plain(a), dtaps.contiguous()
    parts = [a.ratio.new_empty((_spans(a.length), *a.ratio.shape)) for _ in range(2)]
    native.run("diagonal_kernel_backward", _Backward(*_values(a, dtaps), *(p.data_ptr() for p in parts)))
    return {"ratio": parts[0].sum(0), "weight": parts[1].sum(0)}


_taps = with_gradient(_forward, _backward, powers_summed)


def _plain(a: Powers) -> Powers:
    ratio, weight = (x.resolve_conj().contiguous() for x in (a.ratio, a.weight))
    return a._replace(ratio=ratio, weight=weight)


def _values(a: Powers, taps: Tensor) -> list[int]:
    """The fields of ``_Forward``."""
    d, n = a.ratio.shape
    addresses = [x.data_ptr() for x in (a.ratio, a.weight, taps)]
    sizes = [native.DTYPES[taps.dtype], a.ratio.is_complex(), a.length, d, n]
    return [*addresses, *sizes, native.threads(taps.numel() * n)]


def _spans(length: int) -> int:
    block = LEAST
    while block * block < length:
        block *= 2
    return -(-length // (block * SPAN))
