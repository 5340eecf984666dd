"""Other people's mixers and models, with our weights in them.

Each is made from one of ours: a function of x, and which of its weights is which of ours. What it has no counterpart
for it refuses with NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench import Measurement, Plan, refusal
from ssmkernels.bench.contest import first_line
from ssmkernels.bench.peers import MAMBA_SSM, MAMBAPY, TORCH, TRANSFORMERS, Package, refuse
from ssmzoo.bench.mamba_peers import mamba_ssm, mambapy, transformers_mamba, transformers_model
from ssmzoo.bench.recurrent_peers import recurrent_gemma, torch_rnn
from ssmzoo.bench.twins import Twin, defaults_but, filled
from ssmzoo.model import SequenceModel


@dataclass(frozen=True)
class MixerPeer:
    name: str
    package: Package
    make: Callable[[Any], Twin]
    note: str = ""


def llama_attention(mixer: Any) -> Twin:
    """transformers' LlamaAttention through SDPA; its angles are computed in each call, as ours are."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    defaults_but(mixer, "head_dim", "n_heads", "n_kv_heads", "rope_base", "bias", "out_bias")
    bias = mixer.q_proj.bias is not None
    refuse(bias != (mixer.out_proj.bias is not None), "biases on some projections alone")
    refuse(mixer.gate_proj is not None, "gate")
    refuse(mixer.scaling is not None, "other scaling of angles here")
    config = LlamaConfig(
        hidden_size=mixer.d_model,
        num_attention_heads=mixer.n_heads,
        num_key_value_heads=mixer.n_kv_heads,
        head_dim=mixer.head_dim,
        attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": float(mixer.rope_base)},
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    weight = mixer.q_proj.weight
    theirs = LlamaAttention(config, layer_idx=0).to(weight.device, weight.dtype)
    angles = LlamaRotaryEmbedding(config).to(weight.device)

    def call(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return theirs(x, position_embeddings=angles(x, positions))[0]

    names = {name.replace("o_proj", "out_proj"): p for name, p in theirs.named_parameters()}
    return filled(call, names, mixer)


RECURRENT = (MixerPeer("torch", TORCH, torch_rnn, "the same network, called directly"),)
MIXERS: dict[str, tuple[MixerPeer, ...]] = {
    "mamba": (
        MixerPeer("transformers", TRANSFORMERS, transformers_mamba, "a loop over time where mamba_ssm is missing"),
        MixerPeer("mambapy", MAMBAPY, mambapy),
        MixerPeer("mamba_ssm", MAMBA_SSM, mamba_ssm),
    ),
    "mamba2": (
        MixerPeer("transformers", TRANSFORMERS, transformers_mamba, "chunks in PyTorch where mamba_ssm is missing"),
    ),
    "rglru": (MixerPeer("transformers", TRANSFORMERS, recurrent_gemma, "a loop over time"),),
    "attention": (MixerPeer("transformers", TRANSFORMERS, llama_attention, "LlamaAttention through SDPA"),),
    "lstm": RECURRENT,
    "gru": RECURRENT,
}


@dataclass(frozen=True)
class ModelPeer:
    name: str
    package: Package
    make: Callable[[SequenceModel], nn.Module]
    note: str = ""


MODELS = (ModelPeer("transformers", TRANSFORMERS, transformers_model, "a loop over time where mamba_ssm is missing"),)


def on(device: str, peers: tuple[Any, ...]) -> list[Any]:
    """Those whose package runs on a kind of device."""
    return [peer for peer in peers if device in peer.package.devices]


def rivals(
    kind: str, name: str, ours: nn.Module, peers: tuple[Any, ...], plan: Plan
) -> tuple[list[tuple[str, str, Any]], list[Measurement]]:
    """Name, note and what each peer makes of ours; and the rows that say why others cannot take part."""
    made, absent = [], []
    for peer in on(plan.device.type, peers) if plan.peers else ():
        try:
            why = peer.package.missing
            if not why:
                made.append((peer.name, peer.note, peer.make(ours)))
        except Exception as error:  # whatever other people's code raises
            why = f"cannot be built: {first_line(error)}"
        if why:
            absent.append(refusal(kind, name, peer.name, "peer", why, plan))
    return made, absent
