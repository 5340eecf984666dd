"""Falcon-H1 (Zuo et al. 2025, arXiv 2507.22448): attention and Mamba-2 side by side in each layer, and multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.renaming import Rule

NAME = "Falcon-H1"
ARCHITECTURE = "FalconH1ForCausalLM"

RULES: list[Rule] = [
    *_common.ends_rules("final_layernorm"),
    *_common.norm_rules("input_layernorm", "pre_ff_layernorm"),
    *_common.attention_rules("self_attn", "mixer.branches.attention"),
    *_common.mamba_rules("mamba", "mixer.branches.mamba2"),
    *_common.gated_mlp_rules("feed_forward", "mlp"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    _common.require(given, hidden_act="silu", projectors_bias=given.get("mamba_proj_bias", False))
    eps, attention = given.get("rms_norm_eps", 1e-5), _common.attention_options(given)
    attention |= _common.rope_options(given, attention["head_dim"])
    gate, down = given.get("mlp_multipliers") or (1.0, 1.0)
    return {
        **_common.ends_options(given),
        "pattern": ["both"],
        "mixers": {
            "both": {
                "kind": "parallel",
                "branches": ["mamba2", "attention"],
                "combine": "sum",
                "in_multipliers": {
                    "mamba2": given.get("ssm_in_multiplier", 1.0),
                    "attention": given.get("attention_in_multiplier", 1.0),
                },
                "out_multipliers": {
                    "mamba2": given.get("ssm_out_multiplier", 1.0),
                    "attention": given.get("attention_out_multiplier", 1.0),
                },
            },
            "mamba2": _common.mamba2_options(given, eps)
            | {
                "rmsnorm": given.get("mamba_rms_norm", False),
                "norm_before_gate": given.get("mamba_norm_before_gate", True),
                "multipliers": list(given.get("ssm_multipliers") or (1.0,) * 5),
            },
            "attention": attention | {"scale": given.get("key_multiplier", 1.0) * attention["head_dim"] ** -0.5},
        },
        "mlp": {
            "kind": "swiglu",
            "d_intermediate": given["intermediate_size"],
            "bias": given.get("mlp_bias", False),
            "gate_multiplier": gate,
            "out_multiplier": down,
        },
        "norm_eps": eps,
        "embedding_multiplier": given.get("embedding_multiplier", 1.0),
        "logit_multiplier": given.get("lm_head_multiplier", 1.0),
    }


def config_json(d: Description) -> dict[str, Any]:
    both, mlp = d.mixer("parallel"), d.mlp("swiglu")
    branches = {options["kind"]: (name, options) for name, options in both.get("branches", {}).items()}
    (mamba_name, mamba), (attention_name, attention) = (branches.get(k, ("", {})) for k in ("mamba2", "attention"))
    ins, outs = both.get("in_multipliers", {}), both.get("out_multipliers", {})
    width = round(mamba.get("expand", 2) * d.config.d_model)
    scale = attention.get("scale", 1.0) * attention.get("head_dim", 1) ** 0.5
    return {
        **_common.ends_json(d),
        **_common.attention_json(attention),
        **_common.rope_json(attention),
        **_common.mamba2_json({**mamba, "expand": 2}, d.config.d_model),
        "mamba_d_ssm": width,
        "mamba_n_heads": width // mamba.get("headdim", 1),
        "mamba_rms_norm": mamba.get("rmsnorm", False),
        "mamba_norm_before_gate": mamba.get("norm_before_gate", True),
        "ssm_multipliers": list(mamba.get("multipliers", (1.0,) * 5)),
        "ssm_in_multiplier": ins.get(mamba_name, 1.0),
        "ssm_out_multiplier": outs.get(mamba_name, 1.0),
        "attention_in_multiplier": ins.get(attention_name, 1.0),
        "attention_out_multiplier": outs.get(attention_name, 1.0),
        "key_multiplier": scale,
        "projectors_bias": mamba.get("bias", False),
        "intermediate_size": mlp.get("d_intermediate"),
        "mlp_bias": mlp.get("bias", False),
        "mlp_multipliers": [mlp.get("gate_multiplier", 1.0), mlp.get("out_multiplier", 1.0)],
        "embedding_multiplier": d.config.embedding_scale,
        "lm_head_multiplier": d.config.logit_multiplier,
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }
