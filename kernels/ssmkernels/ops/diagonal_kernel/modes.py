"""From a diagonal model to sums of powers: what the fast implementations share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.diagonal_kernel.discretize import discretize_diagonal, softmax_modes, widen

# ratio (d n) and weight (d n) in float64 or complex128, length, the dtype of the result → Σ_n weight ratio^t,
# t < length, (d length), twice the real part where they are complex.
Taps = Callable[[Tensor, Tensor, int, torch.dtype], Tensor]


def sum_of_powers(taps: Taps, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    """The kernel by way of ``taps``. Ratios are made in float64: only there has a high power all of its digits."""
    wide = precision(A, B, C, dt)
    A, dt = widen(A, torch.float64), dt.double()
    if discretization != "dss":
        ratio, B_bar = discretize_diagonal(A, B, dt, discretization=discretization)
        return taps(ratio, C * B_bar, length, wide)
    ratio, gain, grows = softmax_modes(A, dt, length)
    weight = C * (gain * B)
    if A.device.type == "cpu" and not grows.any():  # elsewhere it costs more to ask than to compute
        return taps(ratio, weight, length, wide)
    K = taps(ratio, torch.where(grows, 0, weight), length, wide)
    return K + taps(ratio, torch.where(grows, weight, 0), length, wide).flip(-1)


def powers_summed(ratio: Tensor, weight: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """:data:`Taps` as its formula stands."""
    taps = []
    for _ in range(length):
        tap = weight.sum(-1)
        taps.append(2 * tap.real if tap.is_complex() else tap)
        weight = weight * ratio
    return torch.stack(taps, dim=-1).to(dtype) if taps else weight.real[:, :0].to(dtype)


def power_table(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """a (d n) → a^0, ..., a^{count-1} (d n count), and a^m for the power of two m ≥ count. By doubling."""
    powers = torch.ones_like(a)[..., None]
    while powers.shape[-1] < count:
        powers = torch.cat([powers, powers * a[..., None]], dim=-1)
        a = a * a
    return powers[..., :count], a
