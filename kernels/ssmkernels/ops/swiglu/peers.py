"""Other people's gated product.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import FLA, TORCH, Peer, calls_like


@calls_like("swiglu", takes="scale")
def torch_swiglu(a: Any) -> Tensor:
    """PyTorch's silu, and the products beside it."""
    return F.silu(a.gate if a.scale == 1 else a.gate * a.scale) * a.up


@calls_like("swiglu")
def fla(a: Any) -> Tensor:
    """flash-linear-attention's Triton kernel."""
    from fla.modules.activations import swiglu

    return swiglu(a.gate, a.up)


PEERS = {"swiglu": (Peer("F.silu", TORCH, torch_swiglu, "in two passes, or three"), Peer("fla", FLA, fla))}
