"""Other people's selective scans.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import MAMBA_SSM, MAMBAPY, TORCH, TRANSFORMERS, Peer, Setting, refuse
from ssmkernels.core.names import OPS
from ssmkernels.ops.selective_scan import external_mamba_ssm as package

SETTINGS = {
    "selective_scan": Setting(
        case={"state": False}, arguments={"return_final_state": False}, note="from a zero state, output alone"
    )
}


def loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As people write it without a kernel: everything (b l d n) at once, then a loop over time."""
    refuse(initial_state is not None or cu_seqlens is not None, "initial state or packed sequences")
    decay, fed = _discretized(u, delta, A, B, C, delta_bias, delta_softplus)
    h = torch.zeros_like(fed[:, 0])
    outputs = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + fed[:, t]
        outputs.append((h @ C[:, t, :, None].to(h.dtype))[..., 0])
    y = _finished(torch.stack(outputs, dim=1), u, D, z)
    return (y, h) if return_final_state else y


def mambapy(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """mambapy's parallel scan, within the lines that its MambaBlock has around it."""
    from mambapy.pscan import pscan

    refuse(initial_state is not None or cu_seqlens is not None, "initial state or packed sequences")
    states = pscan(*_discretized(u, delta, A, B, C, delta_bias, delta_softplus))
    y = _finished((states @ C[..., None].to(states.dtype))[..., 0], u, D, z)
    return (y, states[:, -1]) if return_final_state else y


def transformers(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What transformers' Mamba calls; without mamba_ssm that is a loop over time."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    refuse(initial_state is not None or cu_seqlens is not None, "initial state or packed sequences")
    refuse(A.is_complex() or B.ndim != 3, "complex A, fixed maps or groups")
    found = mamba_selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D=D,
        z=None if z is None else z.transpose(1, 2),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        return_last_state=return_final_state,
    )
    y, last = found if return_final_state else (found, None)
    y = y.transpose(1, 2).to(u.dtype)  # as their mixer does
    return y if last is None else (y, last)


def mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm's CUDA kernel, which wants channels before time."""
    refuse(initial_state is not None or cu_seqlens is not None, "initial state or packed sequences")
    refuse(A.is_complex() or B.ndim != 3, "complex A, fixed maps or groups in this adapter")
    arguments = OPS["selective_scan"].declared.Arguments
    y, last = package.call(arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, None, None))
    return (y, last) if return_final_state else y


def transformers_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """What transformers' Mamba does for one token."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    refuse(A.is_complex() or B.ndim != 2, "complex A or groups")
    return mamba_selective_state_update(
        state, u, delta, A, B, C, D=D, dt_bias=delta_bias, dt_softplus=delta_softplus, z=z
    )


def mamba_ssm_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """mamba_ssm's Triton kernel for one token."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    refuse(A.is_complex(), "complex A")
    return selective_state_update(state, u, delta, A, B, C, D=D, z=z, dt_bias=delta_bias, dt_softplus=delta_softplus)


def _discretized(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """exp(Δ A) and Δ B u, (b l d n)."""
    refuse(A.is_complex() or B.ndim != 3 or C.ndim != 3, "complex A, fixed maps or groups")
    delta = delta if delta_bias is None else delta + delta_bias
    delta = F.softplus(delta) if delta_softplus else delta
    delta = delta.to(torch.promote_types(delta.dtype, A.dtype))[..., None]
    return torch.exp(delta * A), delta * B[:, :, None] * u[..., None]


def _finished(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = y if D is None else y + D * u
    return (y if z is None else y * F.silu(z)).to(u.dtype)


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
