"""The kernel of a diagonal state-space model as it stands in many repositories: one einsum over all powers."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.bench.peers import TORCH, Peer, refuse


def einsum(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, discretization: str = "zoh") -> Tensor:
    """The Vandermonde product, by zero-order hold."""
    refuse(discretization != "zoh" or not A.is_complex(), "discretization but zoh, nor a real A")
    step = A * dt[:, None]
    B_bar = B * torch.expm1(step) / A
    powers = torch.exp(step[..., None] * torch.arange(length, device=A.device))  # (d n length)
    return 2 * torch.einsum("dn,dnl->dl", C * B_bar, powers).real


PEERS = {"diagonal_kernel": (Peer("einsum", TORCH, einsum, "holds (d n length) complex numbers in memory"),)}
