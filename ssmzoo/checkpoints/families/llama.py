"""Llama, 1 to 3 (Touvron et al. 2023, arXiv 2302.13971; Llama Team 2024, arXiv 2407.21783), and models of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _llama

NAME = "Llama"
ARCHITECTURE = "LlamaForCausalLM"
RULES = _llama.RULES


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    return _llama.config_of(given, {}, [False] * given["num_hidden_layers"])


def config_json(d: Description) -> dict[str, Any]:
    return _llama.json_of(d, d.mixer("attention")) | {"mlp_bias": d.mlp("swiglu").get("bias", False)}
