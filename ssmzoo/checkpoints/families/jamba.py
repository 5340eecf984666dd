"""Jamba (Lieber et al. 2024, arXiv 2403.19887): Mamba, attention without positions, experts in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.families._common import (
    ENDS,
    LAYER,
    attention_options,
    attention_rules,
    gated_mlp_rules,
    mamba_rules,
    require,
)
from ssmzoo.checkpoints.renaming import Rule

NAME = "Jamba"

RULES: list[Rule] = [
    *ENDS,
    (rf"{LAYER}input_layernorm\.weight", r"layers.\1.norm.weight"),
    (rf"{LAYER}pre_ff_layernorm\.weight", r"layers.\1.norm2.weight"),
    *attention_rules("self_attn", "mixer"),
    *mamba_rules("mamba", "mixer"),
    (rf"{LAYER}feed_forward\.router\.weight", r"layers.\1.mlp.router.proj.weight"),
    (rf"{LAYER}feed_forward\.experts\.gate_up_proj", r"layers.\1.mlp.experts.fc1.weight"),
    (rf"{LAYER}feed_forward\.experts\.down_proj", r"layers.\1.mlp.experts.fc2.weight"),
    # On disk they lie one by one.
    (rf"{LAYER}feed_forward\.experts\.(\d+)\.gate_proj\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,0]"),
    (rf"{LAYER}feed_forward\.experts\.(\d+)\.up_proj\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,1]"),
    (rf"{LAYER}feed_forward\.experts\.(\d+)\.down_proj\.weight", r"layers.\1.mlp.experts.fc2.weight[\2,0]"),
    *gated_mlp_rules("feed_forward", "mlp"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, hidden_act="silu")
    period, offset = given.get("attn_layer_period", 8), given.get("attn_layer_offset", 4)
    wide = {"kind": "swiglu", "d_intermediate": given["intermediate_size"]}
    n_experts = given.get("num_experts", given.get("num_local_experts", 16))
    experts = {
        "kind": "moe",
        "n_experts": n_experts,
        "top_k": given.get("num_experts_per_tok", 2),
        "d_intermediate": given["intermediate_size"],
        "norm": None,
    }
    every, first = given.get("expert_layer_period", 2), given.get("expert_layer_offset", 1)
    eps = given.get("rms_norm_eps", 1e-6)
    values: dict[str, Any] = {
        "d_model": given["hidden_size"],
        "n_layers": given["num_hidden_layers"],
        "pattern": ["attention" if i == offset else "mamba" for i in range(period)],
        "mixers": {
            "mamba": {
                "d_state": given.get("mamba_d_state", 16),
                "d_conv": given.get("mamba_d_conv", 4),
                "expand": given.get("mamba_expand", 2),
                "dt_rank": given.get("mamba_dt_rank", "auto"),
                "conv_bias": given.get("mamba_conv_bias", True),
                "bias": given.get("mamba_proj_bias", False),
                "bcdt_norm": "weighted",
                "bcdt_norm_eps": eps,
            },
            "attention": attention_options(given),
        },
        "vocab_size": given["vocab_size"],
        "norm_eps": eps,
        "tie_embeddings": given.get("tie_word_embeddings", False),
    }
    if n_experts > 1:
        values["mlp_pattern"] = ["moe" if i == first else "swiglu" for i in range(every)]
        values["mlps"] = {"moe": experts, "swiglu": wide}
    else:
        values["mlp"] = wide
    return values
