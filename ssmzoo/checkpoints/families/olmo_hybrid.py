"""OLMo-Hybrid (Ai2 2025): gated DeltaNet with negative eigenvalues and attention with post-norms, three to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.families._delta import convolution_rules, delta_json, delta_options, widths
from ssmzoo.checkpoints.renaming import Rule

NAME = "OLMo-Hybrid"
ARCHITECTURE = "OlmoHybridForCausalLM"

LINEAR = rf"{LAYER}linear_attn\."


def rules_for(given: Mapping[str, Any]) -> list[Rule]:
    attention: list[Rule] = [
        (rf"{LAYER}(?:feedforward_layer_norm|post_attention_layernorm)\.weight", r"layers.\1.norm_after.weight"),
        (rf"{LAYER}post_feedforward_layernorm\.weight", r"layers.\1.norm2_after.weight"),
        *_common.attention_rules("self_attn", "mixer"),
        (rf"{LAYER}self_attn\.([qk])_norm\.weight", r"layers.\1.mixer.\2_norm.weight"),
    ]
    return [
        *_common.ends_rules("norm"),
        *_common.at_layers([i for i, kind in enumerate(given["layer_types"]) if kind == "full_attention"], attention),
        (rf"{LAYER}(?:attention_layer_norm|input_layernorm)\.weight", r"layers.\1.norm.weight"),
        (rf"{LAYER}(?:feedforward_layer_norm|post_attention_layernorm)\.weight", r"layers.\1.norm2.weight"),
        *convolution_rules("linear_attn", *widths(given)),
        (rf"{LINEAR}(A_log|dt_bias|o_norm\.weight|[qkvabgo]_proj\.weight)", r"layers.\1.mixer.\2"),
        *_common.gated_mlp_rules("mlp", "mlp"),
    ]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    _common.require(given, hidden_act="silu")
    eps, attention = given.get("rms_norm_eps", 1e-6), _common.attention_options(given)
    if (given.get("rope_parameters") or {}).get("rope_theta") is not None:
        attention |= _common.rope_options(given, attention["head_dim"])
    names = {"linear_attention": "gated_deltanet", "full_attention": "attention"}
    return {
        **_common.ends_options(given),
        "pattern": [names[kind] for kind in given["layer_types"]],
        "mixers": {
            "gated_deltanet": delta_options(given) | {"allow_neg_eigval": given.get("linear_allow_neg_eigval", True)},
            "attention": attention | {"qk_norm": "whole", "qk_norm_eps": eps, "norm_placement": "post"},
        },
        "mlp": {"kind": "swiglu", "d_intermediate": given["intermediate_size"]},
        "norm_eps": eps,
    }


def config_json(d: Description) -> dict[str, Any]:
    attention, delta = d.mixer("attention"), d.mixer("gated_deltanet")
    return {
        **_common.ends_json(d),
        **_common.attention_json(attention),
        **(_common.rope_json(attention) if attention.get("rope", True) else {"rope_parameters": None}),
        **delta_json(delta),
        "linear_allow_neg_eigval": delta.get("allow_neg_eigval", True),
        "layer_types": ["linear_attention" if kind == "gated_deltanet" else "full_attention" for kind in d.kinds],
        "intermediate_size": d.mlp("swiglu").get("d_intermediate"),
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }
