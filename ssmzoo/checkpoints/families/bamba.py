"""Bamba (IBM, Princeton, CMU and UIUC 2024): Mamba-2 with a few layers of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import (
    LAYER,
    attention_json,
    attention_options,
    attention_rules,
    ends_json,
    ends_rules,
    gated_mlp_rules,
    mamba2_json,
    mamba2_options,
    mamba_rules,
    require,
    rope_json,
    rope_options,
)
from ssmzoo.checkpoints.renaming import Rule

NAME = "Bamba"
ARCHITECTURE = "BambaForCausalLM"

MIXERS = {"attention": attention_rules("self_attn", "mixer"), "mamba2": mamba_rules("mamba", "mixer")}

RULES: list[Rule] = [
    *ends_rules("final_layernorm"),
    (rf"{LAYER}input_layernorm\.weight", r"layers.\1.norm.weight"),
    (rf"{LAYER}pre_ff_layernorm\.weight", r"layers.\1.norm2.weight"),
    *MIXERS["attention"],
    *MIXERS["mamba2"],
    *gated_mlp_rules("feed_forward", "mlp"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, hidden_act="silu")
    eps, attention = given.get("rms_norm_eps", 1e-5), attention_options(given)
    at = given.get("attn_layer_indices") or ()
    return {
        "d_model": given["hidden_size"],
        "n_layers": given["num_hidden_layers"],
        "pattern": ["attention" if i in at else "mamba2" for i in range(given["num_hidden_layers"])],
        "mixers": {
            "mamba2": mamba2_options(given, eps),
            "attention": attention | rope_options(given, attention["head_dim"], 0.5),
        },
        "mlp": {
            "kind": "swiglu",
            "d_intermediate": given["intermediate_size"],
            "bias": given.get("mlp_bias", False),
        },
        "vocab_size": given["vocab_size"],
        "norm_eps": eps,
        "tie_embeddings": given.get("tie_word_embeddings", False),
    }


def config_json(d: Description) -> dict[str, Any]:
    attention, mlp = d.mixer("attention"), d.mlp("swiglu")
    return {
        **ends_json(d),
        **attention_json(attention),
        **rope_json(attention),
        **mamba2_json(d.mixer("mamba2"), d.config.d_model),
        "attn_layer_indices": [i for i, kind in enumerate(d.kinds) if kind == "attention"],
        "intermediate_size": mlp.get("d_intermediate"),
        "mlp_bias": mlp.get("bias", False),
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }
