"""MiniMax-Text-01 (MiniMax 2025, arXiv 2501.08313): lightning attention, attention in every eighth layer, experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.families._common import (
    ENDS,
    LAYER,
    attention_options,
    attention_rules,
    require,
    rope_options,
)
from ssmzoo.checkpoints.renaming import Rule

NAME = "MiniMax-Text-01"

MOE = rf"{LAYER}(?:mlp|block_sparse_moe)\."

RULES: list[Rule] = [
    *ENDS,
    (rf"{LAYER}input_layernorm\.weight", r"layers.\1.norm.weight"),
    (rf"{LAYER}post_attention_layernorm\.weight", r"layers.\1.norm2.weight"),
    *attention_rules("self_attn", "mixer"),
    (rf"{LAYER}self_attn\.(qkv_proj|output_gate|norm|out_proj)\.weight", r"layers.\1.mixer.\2.weight"),
    (rf"{LAYER}self_attn\.(?:slope_rate|query_decay|key_decay|diagonal_decay)", ""),  # they follow from the layer
    (rf"{MOE}gate\.weight", r"layers.\1.mlp.router.proj.weight"),
    (rf"{MOE}experts\.gate_up_proj", r"layers.\1.mlp.experts.fc1.weight"),
    (rf"{MOE}experts\.down_proj", r"layers.\1.mlp.experts.fc2.weight"),
    # On disk they lie one by one.
    (rf"{MOE}experts\.(\d+)\.w1\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,0]"),
    (rf"{MOE}experts\.(\d+)\.w3\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,1]"),
    (rf"{MOE}experts\.(\d+)\.w2\.weight", r"layers.\1.mlp.experts.fc2.weight[\2,0]"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, hidden_act="silu", sliding_window=None)
    attention = attention_options(given)
    head_dim, heads, n_layers = attention["head_dim"], attention["n_heads"], given["num_hidden_layers"]
    kinds = given.get("layer_types") or ["linear_attention" if i % 2 else "full_attention" for i in range(n_layers)]
    attention |= rope_options({"rope_theta": 1e6} | dict(given), head_dim)
    if given.get("rotary_dim"):
        attention["rope_dim"] = given["rotary_dim"]
    return {
        "d_model": given["hidden_size"],
        "n_layers": n_layers,
        "pattern": ["lightning" if kind == "linear_attention" else "attention" for kind in kinds],
        "mixers": {"lightning": {"head_dim": head_dim, "n_heads": heads}, "attention": attention},
        "mlp": {
            "kind": "moe",
            "n_experts": given.get("num_local_experts", 8),
            "top_k": given.get("num_experts_per_tok", 2),
            "d_intermediate": given["intermediate_size"],
        },
        "vocab_size": given["vocab_size"],
        "norm_placement": "stream",
        "norm_eps": given.get("rms_norm_eps", 1e-5),
        "skip_multiplier": _factor(given, kinds, "alpha"),
        "residual_multiplier": _factor(given, kinds, "beta"),
        "tie_embeddings": given.get("tie_word_embeddings", False),
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
