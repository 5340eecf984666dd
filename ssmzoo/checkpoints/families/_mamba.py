"""What transformers' Mamba, Falcon Mamba and Mamba-2 have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import ends_json, ends_options, require, whole
from ssmzoo.checkpoints.renaming import Rule

RULES: list[Rule] = [
    (r"(?:backbone\.)?(?:embeddings|embedding)\.weight", "embedding.weight"),
    (r"(?:backbone\.)?norm_f\.weight", "norm_f.weight"),
    (r"(?:backbone\.)?layers\.(\d+)\.(norm\.weight|mixer\.[\w.]+)", r"layers.\1.\2"),
    (r"lm_head\.weight", "lm_head.weight"),
]


def config_of(given: Mapping[str, Any], kind: str, options: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Values of our config; ``tied`` is the family's default."""
    require(given, hidden_act="silu")
    return {
        **ends_options(given, tied),
        "pattern": [kind],
        "mixers": {kind: dict(options)},
        "norm_eps": given.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": given.get("residual_in_fp32", True),
    }


def json_of(d: Description, mixer: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`config_of` reads, and what both kinds of mixers have."""
    return {
        **ends_json(d),
        "state_size": mixer.get("d_state"),
        "conv_kernel": mixer.get("d_conv"),
        "expand": whole("expand", mixer.get("expand", 2)),
        "use_conv_bias": mixer.get("conv_bias"),
        "use_bias": mixer.get("bias"),
        "layer_norm_epsilon": d.config.norm_eps,
        "residual_in_fp32": d.config.residual_in_fp32,
        "hidden_act": "silu",
    }


def mamba_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of Mamba."""
    expand = given.get("expand", 2)
    if "intermediate_size" in given:  # it counts: falcon-mamba-7b has 8192 of them beside an `expand` of 16
        expand = given["intermediate_size"] / given["hidden_size"]
    return {
        "d_state": given.get("state_size", 16),
        "d_conv": given.get("conv_kernel", 4),
        "expand": int(expand) if expand == int(expand) else expand,
        "dt_rank": given.get("time_step_rank", "auto"),
        "conv_bias": given.get("use_conv_bias", True),
        "bias": given.get("use_bias", False),
    }


def mamba_json(d: Description) -> dict[str, Any]:
    """What :func:`mamba_options` reads."""
    mixer = d.mixer("mamba")
    inside = round(mixer.get("expand", 2) * d.config.d_model)
    return json_of(d, mixer) | {"intermediate_size": inside, "time_step_rank": mixer.get("dt_rank", "auto")}
