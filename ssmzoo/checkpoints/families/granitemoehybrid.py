"""Granite 4.0 H (IBM 2025): Mamba-2, a few layers of attention without positions, multipliers, and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

NAME = "Granite 4.0"
ARCHITECTURE = "GraniteMoeHybridForCausalLM"

MIXERS = {"attention": _common.attention_rules("self_attn", "mixer"), "mamba2": _common.mamba_rules("mamba", "mixer")}
SPARSE = rf"{LAYER}block_sparse_moe\."

RULES: list[Rule] = [
    *_common.ends_rules("norm"),
    *_common.norm_rules("input_layernorm", "post_attention_layernorm"),
    *MIXERS["attention"],
    *MIXERS["mamba2"],
    (rf"{SPARSE}router\.(?:layer\.)?weight", r"layers.\1.mlp.router.proj.weight"),
    # Older files name the maps of the experts otherwise.
    (rf"{SPARSE}(?:input_linear\.weight|experts\.gate_up_proj)", r"layers.\1.mlp.experts.fc1.weight"),
    (rf"{SPARSE}(?:output_linear\.weight|experts\.down_proj)", r"layers.\1.mlp.experts.fc2.weight"),
    (rf"{LAYER}shared_mlp\.input_linear\.weight", r"layers.\1.mlp.shared.fc1.weight"),
    (rf"{LAYER}shared_mlp\.output_linear\.weight", r"layers.\1.mlp.shared.fc2.weight"),
]

# Without experts what is shared is an MLP of its own.
DENSE_RULES: list[Rule] = [
    (rf"{LAYER}shared_mlp\.input_linear\.weight", r"layers.\1.mlp.fc1.weight"),
    (rf"{LAYER}shared_mlp\.output_linear\.weight", r"layers.\1.mlp.fc2.weight"),
    *RULES,
]


def rules(names: Mapping[str, Any]) -> list[Rule]:
    """Those for a checkpoint that holds weights of these names."""
    return RULES if any("block_sparse_moe" in name for name in names) else DENSE_RULES


def rules_for_writing(given: Mapping[str, Any]) -> list[Rule]:
    """Both: no name of ours is in two of them."""
    return DENSE_RULES


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    _common.require(given, hidden_act="silu")
    eps, attention = given.get("rms_norm_eps", 1e-6), _common.attention_options(given)
    if given.get("position_embedding_type") == "rope":
        attention |= _common.rope_options(given, attention["head_dim"])
    kinds = given.get("layer_types") or given.get("layers_block_type") or ["mamba"] * given["num_hidden_layers"]
    mlp = {"kind": "swiglu", "d_intermediate": given.get("shared_intermediate_size", 1024)}
    if given.get("num_local_experts", 8):
        mlp = {
            "kind": "moe",
            "n_experts": given.get("num_local_experts", 8),
            "top_k": given.get("num_experts_per_tok", 2),
            "d_intermediate": given["intermediate_size"],
            "shared_intermediate": mlp["d_intermediate"],
        }
    return {
        **_common.ends_options(given),
        "pattern": ["mamba2" if kind in ("mamba", "linear_attention") else "attention" for kind in kinds],
        "mixers": {
            "mamba2": _common.mamba2_options(given, eps),
            "attention": attention | {"scale": float(given.get("attention_multiplier", 1.0))},
        },
        "mlp": mlp,
        "norm_eps": eps,
        "embedding_multiplier": float(given.get("embedding_multiplier", 1.0)),
        "residual_multiplier": float(given.get("residual_multiplier", 1.0)),
        "logit_multiplier": 1 / given.get("logits_scaling", 1.0),
    }


def config_json(d: Description) -> dict[str, Any]:
    attention, moe = d.mixer("attention"), d.mlp("moe")
    inside = moe.get("shared_intermediate") or d.mlp("swiglu").get("d_intermediate")
    return {
        **_common.ends_json(d),
        **_common.attention_json(attention),
        **_common.rope_json(attention),
        **_common.mamba2_json(d.mixer("mamba2"), d.config.d_model),
        "position_embedding_type": "rope" if attention.get("rope") else None,
        "attention_multiplier": attention.get("scale", 1.0),
        "layer_types": ["linear_attention" if kind == "mamba2" else "full_attention" for kind in d.kinds],
        "shared_intermediate_size": inside,
        "num_local_experts": moe.get("n_experts", 0),
        "num_experts_per_tok": moe.get("top_k", 0),
        "intermediate_size": moe.get("d_intermediate", inside),
        "embedding_multiplier": d.config.embedding_scale,
        "residual_multiplier": d.config.residual_multiplier,
        "logits_scaling": 1 / d.config.logit_multiplier,
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }
