"""Other people's selective scans.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import FROM_ZERO, MAMBA_SSM, MAMBAPY, TORCH, TRANSFORMERS, Peer, calls_like, refuse
from ssmkernels.ops.selective_scan import external_mamba_ssm as package

SETTINGS = {"selective_scan": FROM_ZERO}


@calls_like("selective_scan", takes="D z delta_bias delta_softplus return_final_state")
def loop(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As people write it without a kernel: everything (b l d n) at once, then a loop over time."""
    decay, fed = _discretized(a)
    h = torch.zeros_like(fed[:, 0])
    outputs = []
    for t in range(a.u.shape[1]):
        h = decay[:, t] * h + fed[:, t]
        outputs.append((h @ a.C[:, t, :, None].to(h.dtype))[..., 0])
    y = _finished(a, torch.stack(outputs, dim=1))
    return (y, h) if a.return_final_state else y


@calls_like("selective_scan", takes="D z delta_bias delta_softplus return_final_state")
def mambapy(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """mambapy's parallel scan, within the lines that its MambaBlock has around it."""
    from mambapy.pscan import pscan

    states = pscan(*_discretized(a))
    y = _finished(a, (states @ a.C[..., None].to(states.dtype))[..., 0])
    return (y, states[:, -1]) if a.return_final_state else y


@calls_like("selective_scan", takes="D z delta_bias delta_softplus return_final_state")
def transformers(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """What transformers' Mamba calls; without mamba_ssm that is a loop over time."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    refuse(a.A.is_complex() or a.B.ndim != 3, "complex A, fixed maps or groups")
    u, delta, B, C = (x.transpose(1, 2) for x in (a.u, a.delta, a.B, a.C))
    z = None if a.z is None else a.z.transpose(1, 2)
    found = mamba_selective_scan(
        u, delta, a.A, B, C, a.D, z, a.delta_bias, a.delta_softplus, return_last_state=a.return_final_state
    )
    y, last = found if a.return_final_state else (found, None)
    y = y.transpose(1, 2).to(u.dtype)  # as their mixer does
    return y if last is None else (y, last)


@calls_like("selective_scan", takes="D z delta_bias delta_softplus return_final_state")
def mamba_ssm(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm's CUDA kernel, which wants channels before time."""
    refuse(a.A.is_complex() or a.B.ndim != 3, "complex A, fixed maps or groups in this adapter")
    y, last = package.call(a)
    return (y, last) if a.return_final_state else y


@calls_like("selective_scan_step", takes="D z delta_bias delta_softplus")
def transformers_step(a: Any) -> Tensor:
    """What transformers' Mamba does for one token."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    refuse(a.A.is_complex() or a.B.ndim != 2, "complex A or groups")
    return mamba_selective_state_update(
        a.state, a.u, a.delta, a.A, a.B, a.C, D=a.D, dt_bias=a.delta_bias, dt_softplus=a.delta_softplus, z=a.z
    )


@calls_like("selective_scan_step", takes="D z delta_bias delta_softplus")
def mamba_ssm_step(a: Any) -> Tensor:
    """mamba_ssm's Triton kernel for one token."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    refuse(a.A.is_complex(), "complex A")
    return selective_state_update(
        a.state, a.u, a.delta, a.A, a.B, a.C, a.D, a.z, dt_bias=a.delta_bias, dt_softplus=a.delta_softplus
    )


def _discretized(a: Any) -> tuple[Tensor, Tensor]:
    """exp(Δ A) and Δ B u, (b l d n)."""
    refuse(a.A.is_complex() or a.B.ndim != 3 or a.C.ndim != 3, "complex A, fixed maps or groups")
    delta = a.delta if a.delta_bias is None else a.delta + a.delta_bias
    delta = F.softplus(delta) if a.delta_softplus else delta
    delta = delta.to(torch.promote_types(delta.dtype, a.A.dtype))[..., None]
    return torch.exp(delta * a.A), delta * a.B[:, :, None] * a.u[..., None]


def _finished(a: Any, y: Tensor) -> Tensor:
    """With the skip and the gate."""
    y = y if a.D is None else y + a.D * a.u
    return (y if a.z is None else y * F.silu(a.z)).to(a.u.dtype)


CHANNELS_FIRST = "wants channels before time: our layout is handed over as a transposed view"
PEERS = {
    "selective_scan": (
        Peer("PyTorch loop", TORCH, loop, "holds (b l d n) in memory"),
        Peer("transformers", TRANSFORMERS, transformers, CHANNELS_FIRST),
        Peer("mambapy", MAMBAPY, mambapy, "a parallel scan in PyTorch, which holds (b l d n) in memory"),
        Peer("mamba_ssm", MAMBA_SSM, mamba_ssm, CHANNELS_FIRST, gradients=False),
    ),
    "selective_scan_step": (
        Peer("transformers", TRANSFORMERS, transformers_step),
        Peer("mamba_ssm", MAMBA_SSM, mamba_ssm_step),
    ),
}
