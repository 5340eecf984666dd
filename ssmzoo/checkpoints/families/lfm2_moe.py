"""LFM2 with experts (Liquid AI 2025, arXiv 2511.23404): all layers but the first few are a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _lfm
from ssmzoo.checkpoints.families._common import (
    LAYER,
    expert_rules,
    rope_json,
)
from ssmzoo.checkpoints.renaming import Rule

NAME = "LFM2-MoE"
ARCHITECTURE = "Lfm2MoeForCausalLM"

MIXERS = _lfm.MIXERS

RULES: list[Rule] = [
    *_lfm.RULES,
    (rf"{LAYER}feed_forward\.gate\.weight", r"layers.\1.mlp.router.proj.weight"),
    (rf"{LAYER}feed_forward\.expert_bias", r"layers.\1.mlp.router.correction"),
    *expert_rules("feed_forward", "w1", "w3", "w2"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    dense = given.get("num_dense_layers", 2)
    experts = {
        "n_experts": given.get("num_experts", 32),
        "top_k": given.get("num_experts_per_tok", 4),
        "d_intermediate": given.get("moe_intermediate_size", 1792),
        "scoring": "sigmoid",
        "norm": "after" if given.get("norm_topk_prob", True) else None,
        "scale": given.get("routed_scaling_factor", 1.0),
        "bias_update_rate": 0.0 if given.get("use_expert_bias", True) else None,
    }
    pattern = ["swiglu" if i < dense else "moe" for i in range(given["num_hidden_layers"])]
    options = {"swiglu": {"d_intermediate": given["intermediate_size"]}, "moe": experts}
    used = {kind: options[kind] for kind in options if kind in pattern}
    return _lfm.config_of(given, d_conv=3) | {"mlp_pattern": pattern, "mlps": used}


def config_json(d: Description) -> dict[str, Any]:
    attention, moe = d.mixer("attention"), d.mlp("moe")
    dense = [i for i, layer in enumerate(d.layers) if layer.mlp["kind"] == "moe"]
    return (
        _lfm.json_of(d, attention)
        | rope_json(attention)
        | {
            "num_dense_layers": dense[0] if dense else d.config.n_layers,
            "intermediate_size": d.mlp("swiglu").get("d_intermediate", moe.get("d_intermediate")),
            "num_experts": moe.get("n_experts", 1),
            "num_experts_per_tok": moe.get("top_k", 1),
            "moe_intermediate_size": moe.get("d_intermediate", 1),
            "norm_topk_prob": moe.get("norm") == "after",
            "routed_scaling_factor": moe.get("scale", 1.0),
            "use_expert_bias": moe.get("bias_update_rate") is not None,
        }
    )
