"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060) as transformers stores it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._mamba import RULES, config_of, json_of

__all__ = ["ARCHITECTURE", "NAME", "RULES", "config", "config_json"]

NAME = "Mamba-2"
ARCHITECTURE = "Mamba2ForCausalLM"


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    least, most = given.get("time_step_limit", (0.0, math.inf))
    options = {
        "d_state": given.get("state_size", 128),
        "d_conv": given.get("conv_kernel", 4),
        "expand": given.get("expand", 2),
        "headdim": given.get("head_dim", 64),
        "ngroups": given.get("n_groups", 8),
        "dt_limit": (float(least), float(most)),
        "norm_eps": given.get("layer_norm_epsilon", 1e-5),
        "conv_bias": given.get("use_conv_bias", True),
        "bias": given.get("use_bias", False),
    }
    return config_of(given, "mamba2", options, tied=False)


def config_json(d: Description) -> dict[str, Any]:
    mixer = d.mixer("mamba2")
    return json_of(d, mixer) | {
        "num_heads": round(mixer.get("expand", 2) * d.config.d_model) // mixer.get("headdim", 1),
        "head_dim": mixer.get("headdim"),
        "n_groups": mixer.get("ngroups"),
        "time_step_limit": list(mixer.get("dt_limit", (0.0, math.inf))),
    }
