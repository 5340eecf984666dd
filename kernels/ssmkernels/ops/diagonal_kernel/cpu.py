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


def unsupported(a: Any) -> str | None:
    return wrong_device(a) or ("no channels or no states" if a.A.numel() == 0 else None)


def compute(a: Any) -> Tensor:
    return sum_of_powers(_taps, a)


def _forward(a: Powers) -> Tensor:
    a = _plain(a)
    taps = a.ratio.new_empty((a.ratio.shape[0], a.length), dtype=a.dtype)
    native.run("diagonal_kernel", _values(a, taps))
    return taps


def _backward(a: Powers, dtaps: Tensor, _: set[str]) -> dict[str, Tensor]:
    a, dtaps = _plain(a), dtaps.contiguous()
    parts = [a.ratio.new_empty((_spans(a.length), *a.ratio.shape)) for _ in range(2)]
    gradients = {"dratio": parts[0].data_ptr(), "dweight": parts[1].data_ptr()}
    native.run("diagonal_kernel_backward", _values(a, dtaps) | gradients)
    return {"ratio": parts[0].sum(0), "weight": parts[1].sum(0)}


_taps = with_gradient(_forward, _backward, powers_summed)


def _plain(a: Powers) -> Powers:
    ratio, weight = (x.resolve_conj().contiguous() for x in (a.ratio, a.weight))
    return a._replace(ratio=ratio, weight=weight)


def _values(a: Powers, taps: Tensor) -> dict[str, int]:
    """The kernels' arguments."""
    d, n = a.ratio.shape
    return {
        "ratio": a.ratio.data_ptr(),
        "weight": a.weight.data_ptr(),
        "taps": taps.data_ptr(),
        "dtype": native.DTYPES[taps.dtype],
        "complex": a.ratio.is_complex(),
        "length": a.length,
        "d": d,
        "n": n,
        "threads": native.threads(taps.numel() * n),
    }


def _spans(length: int) -> int:
    block = LEAST
    while block * block < length:
        block *= 2
    return -(-length // (block * SPAN))
