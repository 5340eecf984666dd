"""xLSTM-7B (Beck et al. 2025, arXiv 2503.13427)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import (
    ends_json,
    require,
)
from ssmzoo.checkpoints.renaming import Rule

NAME = "xLSTM"
ARCHITECTURE = "xLSTMForCausalLM"

BLOCK = r"(?:backbone\.)?blocks\.(\d+)\."

RULES: list[Rule] = [
    (r"(?:backbone\.)?embeddings\.weight", "embedding.weight"),
    (r"(?:backbone\.)?out_norm\.weight", "norm_f.weight"),
    (r"lm_head\.weight", "lm_head.weight"),
    (rf"{BLOCK}norm_mlstm\.weight", r"layers.\1.norm.weight"),
    (rf"{BLOCK}norm_ffn\.weight", r"layers.\1.norm2.weight"),
    (rf"{BLOCK}mlstm_layer\.(.*)", r"layers.\1.mixer.\2"),
    (rf"{BLOCK}ffn\.proj_up_gate\.weight", r"layers.\1.mlp.fc1.weight[0]"),
    (rf"{BLOCK}ffn\.proj_up\.weight", r"layers.\1.mlp.fc1.weight[1]"),
    (rf"{BLOCK}ffn\.proj_down\.weight", r"layers.\1.mlp.fc2.weight"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, weight_mode="single", use_bias=False, add_out_norm=True, eps=1e-6)
    d_model = given.get("hidden_size") or given["embedding_dim"]
    eps = given.get("norm_eps", 1e-6)
    multiple = given.get("ffn_round_up_to_multiple_of", 64)
    inside = d_model * given.get("ffn_proj_factor", 2.667)
    return {
        "d_model": d_model,
        "n_layers": given.get("num_hidden_layers") or given["num_blocks"],
        "pattern": ["mlstm"],
        "mixers": {
            "mlstm": {
                "n_heads": given.get("num_heads", 8),
                "qk_dim_factor": given.get("qk_dim_factor", 0.5),
                "v_dim_factor": given.get("v_dim_factor", 1.0),
                "gate_soft_cap": given.get("gate_soft_cap", 15.0),
                "norm_eps": eps,
            }
        },
        "mlp": {"kind": "swiglu", "d_intermediate": int((inside + multiple - 1) // multiple) * multiple},
        "vocab_size": given["vocab_size"],
        "norm_eps": eps,
        "logit_softcap": given.get("output_logit_soft_cap", 30.0),
        "tie_embeddings": given.get("tie_word_embeddings", False),
    }


def config_json(d: Description) -> dict[str, Any]:
    mlstm, inside = d.mixer("mlstm"), d.mlp("swiglu").get("d_intermediate", 0)
    return {
        **ends_json(d),
        "embedding_dim": d.config.d_model,
        "num_blocks": d.config.n_layers,
        "num_heads": mlstm.get("n_heads", 8),
        "qk_dim_factor": mlstm.get("qk_dim_factor", 0.5),
        "v_dim_factor": mlstm.get("v_dim_factor", 1.0),
        "gate_soft_cap": mlstm.get("gate_soft_cap", 15.0),
        "ffn_proj_factor": (inside + 0.5) / d.config.d_model,  # rounded down to `inside`
        "ffn_round_up_to_multiple_of": 1,
        "output_logit_soft_cap": d.config.logit_softcap,
        "norm_eps": d.config.norm_eps,
        "eps": 1e-6,
        "weight_mode": "single",
        "use_bias": False,
        "add_out_norm": True,
    }
