"""LFM2 (Liquid AI 2025, arXiv 2511.23404): gated short convolutions, and attention in a few layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import rope_json
from ssmzoo.checkpoints.families._lfm import MIXERS, RULES, config_of, json_of

__all__ = ["ARCHITECTURE", "MIXERS", "NAME", "RULES", "config", "config_json"]

NAME = "LFM2"
ARCHITECTURE = "Lfm2ForCausalLM"


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    inside = given["intermediate_size"]
    if given.get("block_auto_adjust_ff_dim", True):
        multiple = given.get("block_multiple_of", 256)
        inside = int(given.get("block_ffn_dim_multiplier", 1.0) * int(2 * inside / 3))
        inside = -(-inside // multiple) * multiple
    return config_of(given, d_conv=3) | {"mlp": {"kind": "swiglu", "d_intermediate": inside}}


def config_json(d: Description) -> dict[str, Any]:
    attention = d.mixer("attention")
    inside = {"intermediate_size": d.mlp("swiglu").get("d_intermediate"), "block_auto_adjust_ff_dim": False}
    return json_of(d, attention) | rope_json(attention) | inside
