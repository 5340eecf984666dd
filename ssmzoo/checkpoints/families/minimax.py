"""MiniMax-Text-01 (MiniMax 2025, arXiv 2501.08313): lightning attention, attention in every eighth layer, experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

NAME = "MiniMax-Text-01"
ARCHITECTURE = "MiniMaxForCausalLM"


MIXERS: dict[str, list[Rule]] = {
    "lightning": [
        (rf"{LAYER}self_attn\.(qkv_proj|output_gate|norm|out_proj)\.weight", r"layers.\1.mixer.\2.weight"),
    ],
    "attention": _common.attention_rules("self_attn", "mixer"),
}

RULES: list[Rule] = [
    *_common.ends_rules("norm"),
    *_common.norm_rules("input_layernorm", "post_attention_layernorm"),
    *MIXERS["lightning"],
    *MIXERS["attention"],
    (rf"{LAYER}self_attn\.(?:slope_rate|query_decay|key_decay|diagonal_decay)", ""),  # they follow from the layer
    (rf"{LAYER}(?:block_sparse_moe|mlp)\.gate\.weight", r"layers.\1.mlp.router.proj.weight"),
    *_common.expert_rules("(?:block_sparse_moe|mlp)", "w1", "w3", "w2"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    _common.require(given, hidden_act="silu", sliding_window=None)
    attention = _common.attention_options(given)
    head_dim, heads = attention["head_dim"], attention["n_heads"]
    kinds = _kinds(given)
    attention |= _common.rope_options({"rope_theta": 1e6} | dict(given), head_dim)
    if given.get("rotary_dim"):
        attention["rope_dim"] = given["rotary_dim"]
    return {
        **_common.ends_options(given),
        "pattern": ["lightning" if kind == "linear_attention" else "attention" for kind in kinds],
        "mixers": {"lightning": {"head_dim": head_dim, "n_heads": heads}, "attention": attention},
        "mlp": {
            "kind": "moe",
            "n_experts": given.get("num_local_experts", 8),
            "top_k": given.get("num_experts_per_tok", 2),
            "d_intermediate": given["intermediate_size"],
        },
        "norm_placement": "stream",
        "norm_eps": given.get("rms_norm_eps", 1e-5),
        "skip_multiplier": _factor(given, kinds, "alpha"),
        "residual_multiplier": _factor(given, kinds, "beta"),
    }


def _factor(given: Mapping[str, Any], kinds: list[str], name: str) -> float:
    """α or β, of which there is one for each kind of layer; they must be alike, as in the published model."""
    parts = {"full_attention": "full_attn", "linear_attention": "linear_attn"}
    keys = [f"{parts[kind]}_{name}_factor" for kind in dict.fromkeys(kinds)] + [f"mlp_{name}_factor"]
    factors = {key: float(given.get(key, 1.0)) for key in keys}
    if len(set(factors.values())) > 1:
        all_keys = ", ".join(f"`{key}`" for key in keys)
        raise ValueError(f"config.json: `mlp_{name}_factor` must be as all of {all_keys}; got {list(factors.values())}")
    return factors[keys[0]]


def _kinds(given: Mapping[str, Any]) -> list[str]:
    """Of each layer."""
    layers = range(given["num_hidden_layers"])
    return given.get("layer_types") or ["linear_attention" if i % 2 else "full_attention" for i in layers]


def config_json(d: Description) -> dict[str, Any]:
    attention, moe = d.mixer("attention"), d.mlp("moe")
    parts = ("full_attn", "linear_attn", "mlp")
    lightning = {"head_dim": attention.get("head_dim"), "n_heads": attention.get("n_heads")} | d.mixer("lightning")
    rope = _common.rope_json({"rope_base": 1e6} | attention)
    return {
        **_common.ends_json(d),
        **_common.attention_json(lightning | attention),
        **rope,
        "layer_types": ["linear_attention" if kind == "lightning" else "full_attention" for kind in d.kinds],
        "intermediate_size": moe.get("d_intermediate", 1),
        "num_local_experts": moe.get("n_experts", 1),
        "num_experts_per_tok": moe.get("top_k", 1),
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
        **{f"{part}_alpha_factor": d.config.skip_multiplier for part in parts},
        **{f"{part}_beta_factor": d.config.residual_multiplier for part in parts},
    }
