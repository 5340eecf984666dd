"""Other people's RMSNorm.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import FLA, TORCH, Peer, refuse


def torch_rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    norm_before_gate: bool = True,
    group_size: int | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """PyTorch's rms_norm; sum and gate beside it."""
    refuse(group_size is not None or (gate is not None and not norm_before_gate), "groups, or gates before the norm")
    summed = x if residual is None else x + residual
    y = F.rms_norm(summed, weight.shape, weight, eps)
    y = (y if gate is None else y * F.silu(gate)).to(x.dtype)
    return y if residual is None else (y, summed)


def fla(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    norm_before_gate: bool = True,
    group_size: int | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernel."""
    from fla.modules.layernorm import rms_norm

    refuse(gate is not None or group_size is not None, "gate or groups in this adapter")
    return rms_norm(x, weight, None, residual=residual, eps=eps, prenorm=residual is not None)


PEERS = {
    "rms_norm": (
        Peer("F.rms_norm", TORCH, torch_rms_norm, "adds and norms in two passes"),
        Peer("fla", FLA, fla),
    )
}
