"""Jamba (Lieber et al. 2024, arXiv 2403.19887): Mamba, attention without positions, experts in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

NAME = "Jamba"
ARCHITECTURE = "JambaForCausalLM"

MIXERS = {"attention": _common.attention_rules("self_attn", "mixer"), "mamba": _common.mamba_rules("mamba", "mixer")}

RULES: list[Rule] = [
    *_common.ends_rules("final_layernorm"),
    *_common.norm_rules("input_layernorm", "pre_ff_layernorm"),
    *MIXERS["attention"],
    *MIXERS["mamba"],
    (rf"{LAYER}feed_forward\.router\.weight", r"layers.\1.mlp.router.proj.weight"),
    *_common.expert_rules("feed_forward", "gate_proj", "up_proj", "down_proj"),
    *_common.gated_mlp_rules("feed_forward", "mlp"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    _common.require(given, hidden_act="silu")
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
        **_common.ends_options(given),
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
            "attention": _common.attention_options(given),
        },
        "norm_eps": eps,
    }
    if n_experts > 1:
        values["mlp_pattern"] = ["moe" if i == first else "swiglu" for i in range(every)]
        values["mlps"] = {"moe": experts, "swiglu": wide}
    else:
        values["mlp"] = wide
    return values


def config_json(d: Description) -> dict[str, Any]:
    mamba, moe = d.mixer("mamba"), d.mlp("moe")
    attention_period, attention_offset = _every([kind == "attention" for kind in d.kinds])
    expert_period, expert_offset = _every([layer.mlp["kind"] == "moe" for layer in d.layers])
    return {
        **_common.ends_json(d),
        **_common.attention_json(d.mixer("attention")),
        "attn_layer_period": attention_period,
        "attn_layer_offset": attention_offset,
        "mamba_d_state": mamba.get("d_state", 16),
        "mamba_d_conv": mamba.get("d_conv", 4),
        "mamba_expand": _common.whole("expand", mamba.get("expand", 2)),
        "mamba_dt_rank": mamba.get("dt_rank", "auto"),
        "mamba_conv_bias": mamba.get("conv_bias", True),
        "mamba_proj_bias": mamba.get("bias", False),
        "num_experts": moe.get("n_experts", 1),
        "num_experts_per_tok": moe.get("top_k", 1),
        "expert_layer_period": expert_period,
        "expert_layer_offset": expert_offset,
        "intermediate_size": (moe or d.mlp("swiglu")).get("d_intermediate"),
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }


def _every(chosen: list[bool]) -> tuple[int, int]:
    """Period and offset of the layers that are chosen; both lie beyond the last layer where none is."""
    at = [i for i, yes in enumerate(chosen) if yes]
    if not at:
        return len(chosen) + 1, len(chosen)
    return (at[1] - at[0] if len(at) > 1 else len(chosen)), at[0]
