"""The kernel of a diagonal plus low-rank state-space model as what it is: the recurrence's response to an impulse."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.dplr_kernel.discretize import discretize_dplr, output


def dplr_kernel(
    A: Tensor, P: Tensor, Q: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str
) -> Tensor:
    wide = precision(A, P, Q, B, C, dt)
    A_bar, h = discretize_dplr(A, P, Q, B, dt.to(wide), discretization=discretization)  # h = B̄: the impulse went in
    h = h[..., None]  # (d N 1)
    C = output(C, A).to(wide)[:, None]  # (d 1 N)
    taps = []
    for _ in range(max(length, 1)):
        taps.append((C @ h)[:, :, 0])  # (d 1)
        h = A_bar @ h
    return torch.cat(taps, dim=1)[:, :length].contiguous()
