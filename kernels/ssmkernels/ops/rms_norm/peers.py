"""Other people's RMSNorm.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import FLA, TORCH, Peer, calls_like


@calls_like("rms_norm", takes="eps gate residual")
def torch_rms_norm(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """PyTorch's rms_norm; sum and gate beside it."""
    summed = a.x if a.residual is None else a.x + a.residual
    y = F.rms_norm(summed, a.weight.shape, a.weight, a.eps)
    y = (y if a.gate is None else y * F.silu(a.gate)).to(a.x.dtype)
    return y if a.residual is None else (y, summed)


@calls_like("rms_norm", takes="eps residual")
def fla(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernel."""
    from fla.modules.layernorm import rms_norm

    return rms_norm(a.x, a.weight, None, residual=a.residual, eps=a.eps, prenorm=a.residual is not None)


PEERS = {
    "rms_norm": (
        Peer("F.rms_norm", TORCH, torch_rms_norm, "adds and norms in two passes"),
        Peer("fla", FLA, fla),
    )
}
