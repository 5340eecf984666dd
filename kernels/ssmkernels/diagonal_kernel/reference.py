"""The kernel of a diagonal state-space model as what it is: the recurrence's response to an impulse."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.diagonal_kernel.discretize import discretize_diagonal, widen
from ssmkernels.validate import precision


def diagonal_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    wide = precision(A, B, C, dt)
    A, B, C = (widen(x, wide) for x in (A, B, C))
    A_bar, h = discretize_diagonal(A, B, dt.to(wide), discretization=discretization)  # h = B̄: the impulse went in
    taps = []
    for _ in range(max(length, 1)):
        tap = (C * h).sum(-1)  # (d)
        taps.append(2 * tap.real if A.is_complex() else tap)
        h = A_bar * h  # (d n)
    return torch.stack(taps, dim=-1)[:, :length].contiguous()
