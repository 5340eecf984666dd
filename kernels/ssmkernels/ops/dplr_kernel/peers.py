"""The kernel of a diagonal plus low-rank state-space model as it stands in many repositories: one Cauchy product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.bench.peers import TORCH, Peer, calls_like, refuse
from ssmkernels.ops.dplr_kernel.discretize import discretize_dplr

LARGEST = 2**25  # of (d n length) with gradients


@calls_like("dplr_kernel")
def cauchy(a: Any) -> Tensor:
    """All frequencies and all states at once; conjugate pairs and rank one alone."""
    A, P, Q, B, C, dt, length = a.A, a.P, a.Q, a.B, a.C, a.dt, a.length
    refuse(not A.is_complex(), "real A")
    refuse(P.ndim == 3 and P.shape[1] != 1, "rank but one")
    refuse(length == 0, "length 0")
    graph = torch.is_grad_enabled() and A.requires_grad
    refuse(graph and A.numel() * length > LARGEST, "gradients at this size, which take more than 20 GB of memory")
    P, Q = (x.reshape(A.shape) for x in (P, Q))
    dense, _ = discretize_dplr(A, P, Q, B, dt)
    row = torch.cat([2 * C.real, -2 * C.imag], dim=-1)[:, None]
    row = (row - row @ torch.linalg.matrix_power(dense, length))[:, 0]
    C = torch.complex(row[:, : A.shape[1]], -row[:, A.shape[1] :]) / 2
    omega = torch.exp(-2j * torch.pi / length * torch.arange(length // 2 + 1, device=A.device))
    if length % 2 == 0:
        omega[-1] = torch.tensor(-1 + 1e-6j)  # the bilinear rule's pole is at -1
    z = 2 * (1 - omega) / (1 + omega)
    step = dt[:, None]
    v = torch.stack([torch.stack([X * Y for Y in (B, P)]) for X in (C, Q.conj())])  # (2 2 d n)
    v, w = (torch.cat([x, x.conj()], dim=-1) for x in (v * step, A * step))
    k = (v[..., None] / (z - w[..., None])).sum(-2)  # (2 2 d l/2+1), of (2 2 d 2n l/2+1) numbers
    k = k[0, 0] - k[0, 1] * k[1, 0] / (1 + k[1, 1])
    return torch.fft.irfft(k * 2 / (1 + omega), n=length)


PEERS = {
    "dplr_kernel": (Peer("Cauchy", TORCH, cauchy, "holds (d n length) complex numbers in memory", gradients=False),)
}
