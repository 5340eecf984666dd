"""Granite 4.0 H."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf import keys as gguf
from ssmzoo.checkpoints.gguf.rules import (
    attention_rules,
    ends_rules,
    expert_rules,
    mamba2_rules,
    mlp_rules,
    norm_rules,
    paired_rules,
)
from ssmzoo.checkpoints.renaming import Rule

NAME = "Granite 4.0"
ARCHITECTURE = "granitehybrid"
FAMILIES = ("granitemoehybrid",)

SIZES: gguf.Table = {
    "feed_forward_length": "intermediate_size",
    "expert_shared_feed_forward_length": "shared_intermediate_size",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    gguf.EPS: "rms_norm_eps",
}
ROTARY = "rope.scaling.finetuned"  # llama.cpp's switch for positions, in this architecture


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    rotary = given["position_embedding_type"] == "rope"
    return (
        gguf.written(given, gguf.ENDS, SIZES, gguf.MAMBA2)
        | gguf.heads_written(given, gguf.places(given).get("attention", []))
        | (gguf.rope_written(given, given["head_dim"]) if rotary else {})
        | {
            "context_length": gguf.ATTENTION if rotary else gguf.UNBOUNDED,
            "ssm.inner_size": given["mamba_n_heads"] * given["mamba_d_head"],
            "expert_count": given["num_local_experts"],
            "expert_used_count": given["num_experts_per_tok"],
            ROTARY: rotary,
        }
    )


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    heads, at = gguf.heads_read(keys), gguf.attention_layers(keys)
    layers = range(keys["block_count"])
    inside = keys.get("expert_shared_feed_forward_length", keys["feed_forward_length"])
    ones = {word: keys.get(key, 1.0) for key, word in SIZES.items() if key.endswith("scale")}
    return (
        gguf.read(keys, gguf.ENDS, gguf.MAMBA2)
        | heads
        | (gguf.rope_read(keys, heads["head_dim"]) if keys.get(ROTARY, True) else {})
        | gguf.tied(names)
        | ones
        | {
            "model_type": "granitemoehybrid",
            "layer_types": ["full_attention" if i in at else "linear_attention" for i in layers],
            "position_embedding_type": "rope" if keys.get(ROTARY, True) else None,
            "attention_multiplier": keys.get("attention.scale", 0.0) or heads["head_dim"] ** -0.5,
            "mamba_expand": 2,
            "mamba_d_head": keys["ssm.inner_size"] // keys["ssm.time_step_rank"],
            "intermediate_size": keys["feed_forward_length"],
            "shared_intermediate_size": inside,
            "num_local_experts": keys.get("expert_count", 0),
            "num_experts_per_tok": keys.get("expert_used_count", 0),
            "rms_norm_eps": keys[gguf.EPS],
        }
    )


def rules(given: Mapping[str, Any]) -> list[Rule]:
    at = gguf.places(given)
    attention = at.get("attention", [])
    turned = given["position_embedding_type"] == "rope"
    return [
        *ends_rules(),
        *norm_rules(),
        *(paired_rules(given["num_attention_heads"], given["num_key_value_heads"], attention) if turned else ()),
        *attention_rules(attention),
        *mamba2_rules(given["mamba_n_groups"], at.get("mamba2", [])),
        *expert_rules(),
        *mlp_rules(suffix="_shexp", place="mlp.shared"),
        *mlp_rules(),
    ]
