"""LFM2 with experts (Liquid AI 2025, arXiv 2511.23404): all layers but the first few are a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.families import _lfm
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

NAME = "LFM2-MoE"

RULES: list[Rule] = [
    *_lfm.RULES,
    (rf"{LAYER}feed_forward\.gate\.weight", r"layers.\1.mlp.router.proj.weight"),
    (rf"{LAYER}feed_forward\.expert_bias", r"layers.\1.mlp.router.correction"),
    (rf"{LAYER}feed_forward\.experts\.gate_up_proj", r"layers.\1.mlp.experts.fc1.weight"),
    (rf"{LAYER}feed_forward\.experts\.down_proj", r"layers.\1.mlp.experts.fc2.weight"),
    # On disk they lie one by one.
    (rf"{LAYER}feed_forward\.experts\.(\d+)\.w1\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,0]"),
    (rf"{LAYER}feed_forward\.experts\.(\d+)\.w3\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,1]"),
    (rf"{LAYER}feed_forward\.experts\.(\d+)\.w2\.weight", r"layers.\1.mlp.experts.fc2.weight[\2,0]"),
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
