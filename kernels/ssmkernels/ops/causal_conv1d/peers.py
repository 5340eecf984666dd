"""Other people's causal convolutions.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import CAUSAL_CONV1D, FLA, TORCH, TRANSFORMERS, Peer, Setting, refuse
from ssmkernels.core.names import OPS
from ssmkernels.core.validate import precision
from ssmkernels.ops.causal_conv1d.external_causal_conv1d import call

SETTINGS = {
    "causal_conv1d": Setting(
        case={"state": False}, arguments={"return_final_state": False}, note="from a zero state, output alone"
    )
}


def torch_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """PyTorch's grouped convolution, then its SiLU."""
    refuse(initial_state is not None or cu_seqlens is not None, "initial state or packed sequences")
    d, w = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=w - 1, groups=d)[..., : x.shape[1]].transpose(1, 2)
    y = F.silu(y) if activation == "silu" else y
    return (y, _last(x, w)) if return_final_state else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The CUDA kernel of the package causal_conv1d, which takes time-major tensors as transposed views."""
    refuse(initial_state is not None or cu_seqlens is not None, "initial state or packed sequences")
    y = call(OPS["causal_conv1d"].declared.Arguments(x, weight, bias, activation, None, None))
    return (y, _last(x, weight.shape[1])) if return_final_state else y


def fla(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernel."""
    try:
        from fla.modules.conv import causal_conv1d as conv
    except ImportError:  # where versions before 0.4 keep it
        from fla.modules.convolution import causal_conv1d as conv

    refuse(initial_state is not None or cu_seqlens is not None, "initial state or packed sequences in this adapter")
    y, _ = conv(x=x, weight=weight, bias=bias, activation=activation)
    return (y, _last(x, weight.shape[1])) if return_final_state else y


def transformers_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """What transformers' Mamba does for one token; its state has the channels first."""
    from transformers.models.mamba.modeling_mamba import causal_conv1d_update

    return causal_conv1d_update(x[..., None], state.transpose(1, 2), weight, bias, activation)[..., 0]


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """The package causal_conv1d's kernel for one token."""
    from causal_conv1d import causal_conv1d_update

    refuse(state.dtype != x.dtype, "float32 state beside half precision")
    return causal_conv1d_update(x, state.transpose(1, 2), weight, bias, activation)


def _last(x: Tensor, w: int) -> Tensor:
    """The last w - 1 inputs, zeros before the first: (b w-1 d)."""
    padded = F.pad(x, (0, 0, w - 1, 0))
    return padded[:, padded.shape[1] - (w - 1) :].to(torch.promote_types(x.dtype, precision(x)))


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
