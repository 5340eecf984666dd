"""Nemotron-H (NVIDIA 2025, arXiv 2504.03624) and Nemotron 3: each layer holds one operator.

That is Mamba-2, attention without positions, an MLP or experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import (
    attention_json,
    attention_options,
    ends_json,
    require,
)
from ssmzoo.checkpoints.renaming import Rule

NAME = "Nemotron-H"
ARCHITECTURE = "NemotronHForCausalLM"

LAYER = r"(?:backbone\.|model\.)?layers\.(\d+)\."
EXPERTS = rf"{LAYER}mixer\.experts\."
KINDS = {"M": "mamba2", "linear_attention": "mamba2", "mamba": "mamba2"}
KINDS |= {"*": "attention", "full_attention": "attention", "attention": "attention"}
KINDS |= {"-": "mlp", "mlp": "mlp", "E": "moe", "moe": "moe"}

OUTPUT: Rule = (rf"{LAYER}mixer\.o_proj\.weight", r"layers.\1.mixer.out_proj.weight")
MIXERS = {"attention": [OUTPUT]}

RULES: list[Rule] = [
    (r"(?:backbone\.|model\.)?(?:embeddings|embedding)\.weight", "embedding.weight"),
    (r"(?:backbone\.|model\.)?norm_f\.weight", "norm_f.weight"),
    (r"lm_head\.weight", "lm_head.weight"),
    (rf"{LAYER}norm\.weight", r"layers.\1.norm.weight"),
    (rf"{LAYER}mixer\.([qkv])_proj\.weight", r"layers.\1.mixer.\2_proj.weight"),
    (rf"{LAYER}mixer\.(A_log|D|dt_bias|(?:in_proj|conv1d|out_proj|norm)\.\w+)", r"layers.\1.mixer.\2"),
    OUTPUT,
    (rf"{LAYER}mixer\.up_proj\.(weight|bias)", r"layers.\1.mixer.mlp.fc1.\2"),
    (rf"{LAYER}mixer\.down_proj\.(weight|bias)", r"layers.\1.mixer.mlp.fc2.\2"),
    (rf"{LAYER}mixer\.gate\.weight", r"layers.\1.mixer.mlp.router.proj.weight"),
    (rf"{LAYER}mixer\.gate\.e_score_correction_bias", r"layers.\1.mixer.mlp.router.correction"),
    # On disk they lie one by one.
    (rf"{EXPERTS}(\d+)\.up_proj\.weight", r"layers.\1.mixer.mlp.experts.fc1.weight[\2,0]"),
    (rf"{EXPERTS}(\d+)\.down_proj\.weight", r"layers.\1.mixer.mlp.experts.fc2.weight[\2,0]"),
    (rf"{EXPERTS}up_proj", r"layers.\1.mixer.mlp.experts.fc1.weight"),
    (rf"{EXPERTS}down_proj", r"layers.\1.mixer.mlp.experts.fc2.weight"),
    (rf"{LAYER}mixer\.shared_experts\.up_proj\.weight", r"layers.\1.mixer.mlp.shared.fc1.weight"),
    (rf"{LAYER}mixer\.shared_experts\.down_proj\.weight", r"layers.\1.mixer.mlp.shared.fc2.weight"),
    (rf"{LAYER}mixer\.fc1_latent_proj\.weight", r"layers.\1.mixer.mlp.latent_in.weight"),
    (rf"{LAYER}mixer\.fc2_latent_proj\.weight", r"layers.\1.mixer.mlp.latent_out.weight"),
    (r"mtp\..*", ""),  # layers that predict further tokens, which inference does without
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, mlp_hidden_act="relu2", mamba_hidden_act="silu", n_group=1, sliding_window=None)
    kinds = _kinds(given)
    eps = given.get("layer_norm_epsilon", 1e-5)
    d_model, heads, headdim = given["hidden_size"], given["mamba_num_heads"], given["mamba_head_dim"]
    least, most = given.get("time_step_limit") or (0.0, math.inf)
    bias = given.get("mlp_bias", False)
    experts = {
        "kind": "moe",
        "n_experts": given.get("n_routed_experts", 8),
        "top_k": given.get("num_experts_per_tok", 2),
        "d_intermediate": given.get("moe_intermediate_size"),
        "activation": "relu2",
        "scoring": "sigmoid",
        "norm": "after" if given.get("norm_topk_prob", True) else None,
        "scale": float(given.get("routed_scaling_factor", 1.0)),
        "shared_intermediate": given.get("moe_shared_expert_intermediate_size", 0),
        "d_latent": given.get("moe_latent_size"),
        "bias_update_rate": 0.001,
    }
    if "moe" in (pattern := [KINDS[kind] for kind in kinds]):
        require(given, mlp_bias=False)
    return {
        "d_model": d_model,
        "n_layers": len(pattern),
        "pattern": pattern,
        "mixers": {
            "mamba2": {
                "d_state": given.get("ssm_state_size", 128),
                "d_conv": given.get("conv_kernel", 4),
                "expand": heads * headdim / d_model,
                "headdim": headdim,
                "ngroups": given.get("n_groups", 8),
                "dt_limit": (float(least), float(most)),
                "norm_eps": eps,
                "conv_bias": given.get("use_conv_bias", True),
                "bias": given.get("use_bias", False),
            },
            "attention": attention_options(given),
            "mlp": {
                "kind": "channel",
                "mlp": {"kind": "relu2", "d_intermediate": given["intermediate_size"], "bias": bias},
            },
            "moe": {"kind": "channel", "mlp": experts},
        },
        "vocab_size": given["vocab_size"],
        "norm_eps": eps,
        "residual_in_fp32": given.get("residual_in_fp32", False),
        "tie_embeddings": given.get("tie_word_embeddings", False),
    }


def _kinds(given: Mapping[str, Any]) -> list[str]:
    """Of each layer, by any of its names."""
    return list(given.get("layers_block_type") or given.get("layer_types") or given["hybrid_override_pattern"])


def config_json(d: Description) -> dict[str, Any]:
    mamba = d.mixer("mamba2")
    mlp = d.mixer("channel", lambda options: options["mlp"]["kind"] != "moe").get("mlp", {})
    moe = d.mixer("channel", lambda options: options["mlp"]["kind"] == "moe").get("mlp", {})
    types = {"mamba2": "linear_attention", "attention": "full_attention"}
    kinds = ["moe" if layer.mixer.get("mlp", {}).get("kind") == "moe" else "mlp" for layer in d.layers]
    headdim = mamba.get("headdim", 1)
    return {
        **ends_json(d),
        **attention_json(d.mixer("attention")),
        "layers_block_type": [types.get(layer.mixer["kind"], kinds[i]) for i, layer in enumerate(d.layers)],
        "ssm_state_size": mamba.get("d_state", 1),
        "conv_kernel": mamba.get("d_conv", 4),
        "mamba_num_heads": round(mamba.get("expand", 2) * d.config.d_model) // headdim,
        "mamba_head_dim": headdim,
        "n_groups": mamba.get("ngroups", 1),
        "time_step_limit": list(mamba.get("dt_limit", (0.0, math.inf))),
        "use_conv_bias": mamba.get("conv_bias", True),
        "use_bias": mamba.get("bias", False),
        "mamba_proj_bias": mamba.get("bias", False),
        "mlp_bias": mlp.get("bias", False),
        "intermediate_size": mlp.get("d_intermediate", moe.get("d_intermediate", 1)),
        "n_routed_experts": moe.get("n_experts", 1),
        "num_experts_per_tok": moe.get("top_k", 1),
        "moe_intermediate_size": moe.get("d_intermediate", 1),
        "moe_shared_expert_intermediate_size": moe.get("shared_intermediate", 0),
        "moe_latent_size": moe.get("d_latent"),
        "norm_topk_prob": moe.get("norm") == "after",
        "routed_scaling_factor": moe.get("scale", 1.0),
        "layer_norm_epsilon": d.config.norm_eps,
        "residual_in_fp32": d.config.residual_in_fp32,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "n_group": 1,
    }
