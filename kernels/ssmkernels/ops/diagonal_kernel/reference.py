"""The kernel of a diagonal state-space model as what it is: the recurrence's response to an impulse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.diagonal_kernel.discretize import discretize_diagonal, softmax_modes, widen


def compute(a: Any) -> Tensor:
    wide = precision(a.A, a.B, a.C, a.dt)
    A, B, C = (widen(x, wide) for x in (a.A, a.B, a.C))
    dt, length, discretization = a.dt.to(wide), a.length, a.discretization
    if discretization != "dss":
        A_bar, B_bar = discretize_diagonal(A, B, dt, discretization=discretization)
        return _response(A_bar, B_bar, C, length)
    ratio, gain, grows = softmax_modes(A, dt, length)  # what grows is followed back from its last tap
    forwards, backwards = torch.where(grows, 0, gain * B), torch.where(grows, gain * B, 0)
    return _response(ratio, forwards, C, length) + _response(ratio, backwards, C, length).flip(-1)


def _response(A_bar: Tensor, h: Tensor, C: Tensor, length: int) -> Tensor:
    """The taps (d length) of h_t = Ā h_{t-1} from the state h: what an impulse leaves there is B̄."""
    taps = []
    for _ in range(max(length, 1)):
        tap = (C * h).sum(-1)  # (d)
        taps.append(2 * tap.real if A_bar.is_complex() else tap)
        h = A_bar * h  # (d n)
    return torch.stack(taps, dim=-1)[:, :length].contiguous()
