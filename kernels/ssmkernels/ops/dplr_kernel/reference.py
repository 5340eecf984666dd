"""The kernel of a diagonal plus low-rank state-space model as what it is: the recurrence's response to an impulse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.dplr_kernel.discretize import discretize_dplr, output


def compute(a: Any) -> Tensor:
    wide = precision(a.A, a.P, a.Q, a.B, a.C, a.dt)
    A_bar, h = discretize_dplr(a.A, a.P, a.Q, a.B, a.dt.to(wide), discretization=a.discretization)
    h = h[..., None]  # (d N 1), B̄: the impulse went in
    C = output(a.C, a.A).to(wide)[:, None]  # (d 1 N)
    taps = []
    for _ in range(max(a.length, 1)):
        taps.append((C @ h)[:, :, 0])  # (d 1)
        h = A_bar @ h
    return torch.cat(taps, dim=1)[:, : a.length].contiguous()
