"""Jamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf import keys as gguf
from ssmzoo.checkpoints.gguf.rules import (
    attention_rules,
    ends_rules,
    expert_rules,
    mamba_rules,
    mlp_rules,
    norm_rules,
)
from ssmzoo.checkpoints.renaming import Rule

NAME = "Jamba"
ARCHITECTURE = "jamba"
FAMILIES = ("jamba",)

SIZES: gguf.Table = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_dt_rank",
    "feed_forward_length": "intermediate_size",
    gguf.EPS: "rms_norm_eps",
}


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    experts = given["num_experts"] if given["num_experts"] > 1 else 0
    return (
        gguf.written(given, gguf.ENDS, SIZES)
        | gguf.heads_written(given, gguf.places(given).get("attention", []))
        | {
            "context_length": gguf.ATTENTION,
            "ssm.inner_size": given["mamba_expand"] * given["hidden_size"],
            "expert_count": experts,
            "expert_used_count": given["num_experts_per_tok"] if experts else 0,
        }
    )


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    layers = keys["block_count"]
    experts = [i for i in range(layers) if f"blk.{i}.ffn_gate_inp.weight" in names]
    attention_period, attention_offset = _every(gguf.attention_layers(keys), layers)
    expert_period, expert_offset = _every(experts, layers)
    heads = gguf.heads_read(keys)
    return (
        gguf.read(keys, gguf.ENDS, SIZES)
        | heads
        | gguf.tied(names)
        | {
            "model_type": "jamba",
            "head_dim": keys["embedding_length"] // max(heads["num_attention_heads"], 1),
            "attn_layer_period": attention_period,
            "attn_layer_offset": attention_offset,
            "mamba_expand": 2,
            "num_experts": keys.get("expert_count", 0) or 1,
            "num_experts_per_tok": keys.get("expert_used_count", 0) or 1,
            "expert_layer_period": expert_period,
            "expert_layer_offset": expert_offset,
        }
    )


def _every(at: list[int], layers: int) -> tuple[int, int]:
    """Period and offset of layers; beyond the last one where there are none."""
    if not at:
        return layers + 1, layers
    return (at[1] - at[0] if len(at) > 1 else layers), at[0]


def rules(given: Mapping[str, Any]) -> list[Rule]:
    at = gguf.places(given)
    return [
        *ends_rules(),
        *norm_rules(),
        *attention_rules(at.get("attention", [])),
        *mamba_rules(at.get("mamba", [])),
        *expert_rules(),
        *mlp_rules(),
    ]
