"""From a diagonal model to sums of powers: what the fast implementations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.diagonal_kernel.discretize import discretize_diagonal, softmax_modes, widen


class Powers(NamedTuple):
    """A sum of powers Σ_n weight ratio^t, t < length: (d length), twice the real part where it is complex.

    Attributes:
        ratio, weight: ``(d n)``, float64 or complex128.
        length: the number of taps.
        dtype: of the result.
    """

    ratio: Tensor
    weight: Tensor
    length: int
    dtype: torch.dtype


def sum_of_powers(taps: Callable[[Powers], Tensor], a: Any) -> Tensor:
    """The kernel by way of ``taps``. Ratios are made in float64: only there has a high power all of its digits."""
    wide = precision(a.A, a.B, a.C, a.dt)
    A, dt = widen(a.A, torch.float64), a.dt.double()
    if a.discretization != "dss":
        ratio, B_bar = discretize_diagonal(A, a.B, dt, discretization=a.discretization)
        return taps(Powers(ratio, a.C * B_bar, a.length, wide))
    ratio, gain, grows = softmax_modes(A, dt, a.length)
    weight = a.C * (gain * a.B)
    if A.device.type == "cpu" and not grows.any():  # elsewhere it costs more to ask than to compute
        return taps(Powers(ratio, weight, a.length, wide))
    K = taps(Powers(ratio, torch.where(grows, 0, weight), a.length, wide))
    return K + taps(Powers(ratio, torch.where(grows, weight, 0), a.length, wide)).flip(-1)


def powers_summed(a: Powers) -> Tensor:
    """The sum as its formula stands."""
    weight, taps = a.weight, []
    for _ in range(a.length):
        tap = weight.sum(-1)
        taps.append(2 * tap.real if tap.is_complex() else tap)
        weight = weight * a.ratio
    return torch.stack(taps, dim=-1).to(a.dtype) if taps else weight.real[:, :0].to(a.dtype)


def power_table(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """a (d n) → a^0, ..., a^{count-1} (d n count), and a^m for the power of two m ≥ count. By doubling."""
    powers = torch.ones_like(a)[..., None]
    while powers.shape[-1] < count:
        powers = torch.cat([powers, powers * a[..., None]], dim=-1)
        a = a * a
    return powers[..., :count], a
