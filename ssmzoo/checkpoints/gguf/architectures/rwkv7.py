"""RWKV-7."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ssmzoo.checkpoints.gguf.keys import ENDS, UNBOUNDED, Table, read, written
from ssmzoo.checkpoints.gguf.rules import OURS, block, ends_rules, flat
from ssmzoo.checkpoints.renaming import Parts, Rule, Written

NAME = "RWKV-7"
ARCHITECTURE = "rwkv7"
FAMILIES = ("rwkv7",)

SIZES: Table = {
    "wkv.head_size": "head_dim",
    "attention.layer_norm_epsilon": "norm_eps",
    "attention.decay_lora_rank": "decay_low_rank_dim",
    "attention.iclr_lora_rank": "a_low_rank_dim",
    "attention.value_residual_mix_lora_rank": "v_low_rank_dim",
    "attention.gate_lora_rank": "gate_low_rank_dim",
    "feed_forward_length": "intermediate_size",
}
GROUP_EPS = 64e-5  # of the norm of heads, which llama.cpp has for all models
SHIFTS = "rwkvag"  # the order of the fused weights of token shift
UNUSED = re.compile(r"blk\.0\.time_mix_a([012])\.weight")


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    eps = given["norm_eps"] * given["head_dim"]
    if abs(eps - GROUP_EPS) > 1e-3 * GROUP_EPS:
        raise ValueError(f"`layers.0.mixer.norm_eps` times head_dim is {eps:.3g}, and must be {GROUP_EPS:.3g}")
    rank = given["v_low_rank_dim"] or given["a_low_rank_dim"]  # of a lone layer, which has no value residual
    return written({**given, "v_low_rank_dim": rank}, ENDS, SIZES) | {
        "context_length": UNBOUNDED,
        "attention.head_count": 0,
    }


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return read(keys, ENDS, SIZES) | {"model_type": "rwkv7", "tie_word_embeddings": False}


def rules(given: Mapping[str, Any]) -> list[Rule]:
    at, mixer = block(), f"{OURS}mixer."
    shifts = Parts(
        [f"{mixer}x_{letter}" for letter in SHIFTS],
        lambda tensor: [row.view(1, 1, -1) for row in tensor.reshape(len(SHIFTS), -1)],
        lambda tensors: torch.stack([tensor.view(1, 1, -1) for tensor in tensors]),
    )
    return [
        *ends_rules(),
        (r"token_embd_norm\.(weight|bias)", r"embedding_norm.\1"),
        (rf"{at}attn_norm\.(weight|bias)", rf"{OURS}norm.\2"),
        (rf"{at}attn_norm_2\.(weight|bias)", rf"{OURS}norm2.\2"),
        (r"blk\.0\.time_mix_v[012]\.weight", ""),
        (rf"{at}time_mix_lerp_fused\.weight", shifts),
        (rf"{at}time_mix_([wav])0\.weight", rf"{mixer}\2_lora.lora.2.bias"),
        (rf"{at}time_mix_([wavg])1\.weight", rf"{mixer}\2_lora.lora.0.weight"),
        (rf"{at}time_mix_([wavg])2\.weight", rf"{mixer}\2_lora.lora.2.weight"),
        (rf"{at}time_mix_(k_[ka])\.weight", rf"{mixer}\2"),
        (rf"{at}time_mix_r_k\.weight", flat(f"{mixer}r_k", (-1, given["head_dim"]))),
        (rf"{at}time_mix_receptance\.weight", f"{mixer}r_proj.weight"),
        (rf"{at}time_mix_key\.weight", f"{mixer}k_proj.weight"),
        (rf"{at}time_mix_value\.weight", f"{mixer}v_proj.weight"),
        (rf"{at}time_mix_output\.weight", f"{mixer}o_proj.weight"),
        (rf"{at}time_mix_ln\.(weight|bias)", rf"{mixer}g_norm.\2"),
        (rf"{at}channel_mix_lerp_k\.weight", f"{OURS}mlp.x_k"),
        (rf"{at}channel_mix_(key|value)\.weight", rf"{OURS}mlp.\2.weight"),
    ]


def finished(given: Mapping[str, Any], tensors: list[Written]) -> list[Written]:
    """With weights for the first layer's value residual, which llama.cpp asks for and does not use."""
    found = []
    for tensor in tensors:
        found.append(tensor)
        unused = UNUSED.fullmatch(tensor.name)
        if unused is not None:
            found.append(tensor._replace(name=f"blk.0.time_mix_v{unused[1]}.weight"))
    return found
