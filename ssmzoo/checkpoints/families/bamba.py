"""Bamba (IBM, Princeton, CMU and UIUC 2024): Mamba-2 with a few layers of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.renaming import Rule

NAME = "Bamba"
ARCHITECTURE = "BambaForCausalLM"

MIXERS = {"attention": _common.attention_rules("self_attn", "mixer"), "mamba2": _common.mamba_rules("mamba", "mixer")}

RULES: list[Rule] = [
    *_common.ends_rules("final_layernorm"),
    *_common.norm_rules("input_layernorm", "pre_ff_layernorm"),
    *MIXERS["attention"],
    *MIXERS["mamba2"],
    *_common.gated_mlp_rules("feed_forward", "mlp"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    _common.require(given, hidden_act="silu")
    eps, attention = given.get("rms_norm_eps", 1e-5), _common.attention_options(given)
    at = given.get("attn_layer_indices") or ()
    return {
        **_common.ends_options(given),
        "pattern": ["attention" if i in at else "mamba2" for i in range(given["num_hidden_layers"])],
        "mixers": {
            "mamba2": _common.mamba2_options(given, eps),
            "attention": attention | _common.rope_options(given, attention["head_dim"], 0.5),
        },
        "mlp": {
            "kind": "swiglu",
            "d_intermediate": given["intermediate_size"],
            "bias": given.get("mlp_bias", False),
        },
        "norm_eps": eps,
    }


def config_json(d: Description) -> dict[str, Any]:
    attention, mlp = d.mixer("attention"), d.mlp("swiglu")
    return {
        **_common.ends_json(d),
        **_common.attention_json(attention),
        **_common.rope_json(attention),
        **_common.mamba2_json(d.mixer("mamba2"), d.config.d_model),
        "attn_layer_indices": [i for i, kind in enumerate(d.kinds) if kind == "attention"],
        "intermediate_size": mlp.get("d_intermediate"),
        "mlp_bias": mlp.get("bias", False),
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }
