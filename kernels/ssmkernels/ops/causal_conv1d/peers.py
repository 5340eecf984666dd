"""Other people's causal convolutions.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import CAUSAL_CONV1D, FLA, FROM_ZERO, TORCH, TRANSFORMERS, Peer, calls_like, refuse
from ssmkernels.core.validate import precision
from ssmkernels.ops.causal_conv1d.external_causal_conv1d import call

SETTINGS = {"causal_conv1d": FROM_ZERO}


@calls_like("causal_conv1d", takes="bias activation return_final_state")
def torch_conv1d(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """PyTorch's grouped convolution, then its SiLU."""
    d, w = a.weight.shape
    y = F.conv1d(a.x.transpose(1, 2), a.weight[:, None], a.bias, padding=w - 1, groups=d)[..., : a.x.shape[1]]
    y = y.transpose(1, 2)
    return _results(a, F.silu(y) if a.activation == "silu" else y)


@calls_like("causal_conv1d", takes="bias activation return_final_state")
def causal_conv1d(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The CUDA kernel of the package causal_conv1d, which takes time-major tensors as transposed views."""
    return _results(a, call(a))


@calls_like("causal_conv1d", takes="bias activation return_final_state")
def fla(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernel."""
    try:
        from fla.modules.conv import causal_conv1d as conv
    except ImportError:  # where versions before 0.4 keep it
        from fla.modules.convolution import causal_conv1d as conv

    y, _ = conv(x=a.x, weight=a.weight, bias=a.bias, activation=a.activation)
    return _results(a, y)


@calls_like("causal_conv1d_step", takes="bias activation")
def transformers_step(a: Any) -> Tensor:
    """What transformers' Mamba does for one token; its state has the channels first."""
    from transformers.models.mamba.modeling_mamba import causal_conv1d_update

    return causal_conv1d_update(a.x[..., None], a.state.transpose(1, 2), a.weight, a.bias, a.activation)[..., 0]


@calls_like("causal_conv1d_step", takes="bias activation")
def causal_conv1d_step(a: Any) -> Tensor:
    """The package causal_conv1d's kernel for one token."""
    from causal_conv1d import causal_conv1d_update

    refuse(a.state.dtype != a.x.dtype, "float32 state beside half precision")
    return causal_conv1d_update(a.x, a.state.transpose(1, 2), a.weight, a.bias, a.activation)


def _results(a: Any, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """y, and where it is wanted the final state: the last w - 1 inputs, zeros before the first, (b w-1 d)."""
    if not a.return_final_state:
        return y
    before = a.weight.shape[1] - 1
    padded = F.pad(a.x, (0, 0, before, 0))
    return y, padded[:, padded.shape[1] - before :].to(torch.promote_types(a.x.dtype, precision(a.x)))


CHANNELS_FIRST = "wants channels before time: our layout is handed over as a transposed view"
PEERS = {
    "causal_conv1d": (
        Peer("F.conv1d, F.silu", TORCH, torch_conv1d, CHANNELS_FIRST),
        Peer("causal_conv1d", CAUSAL_CONV1D, causal_conv1d, CHANNELS_FIRST),
        Peer("fla", FLA, fla),
    ),
    "causal_conv1d_step": (
        Peer("transformers", TRANSFORMERS, transformers_step, "its state is handed over as a transposed view"),
        Peer("causal_conv1d", CAUSAL_CONV1D, causal_conv1d_step, "its state is handed over as a transposed view"),
    ),
}
