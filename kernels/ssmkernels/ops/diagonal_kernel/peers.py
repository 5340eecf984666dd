"""The kernel of a diagonal state-space model as it stands in many repositories: one einsum over all powers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.bench.peers import TORCH, Peer, calls_like, refuse


@calls_like("diagonal_kernel")
def einsum(a: Any) -> Tensor:
    """The Vandermonde product, by zero-order hold."""
    refuse(not a.A.is_complex(), "real A")
    step = a.A * a.dt[:, None]
    B_bar = a.B * torch.expm1(step) / a.A
    powers = torch.exp(step[..., None] * torch.arange(a.length, device=a.A.device))  # (d n length)
    return 2 * torch.einsum("dn,dnl->dl", a.C * B_bar, powers).real


PEERS = {"diagonal_kernel": (Peer("einsum", TORCH, einsum, "holds (d n length) complex numbers in memory"),)}
