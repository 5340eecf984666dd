"""Qwen2 and 2.5 (Qwen Team 2024, arXiv 2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _llama

NAME = "Qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
RULES = _llama.RULES


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    biases = {"bias": True, "out_bias": False}
    return _llama.config_of(given, biases, _llama.windowed_layers(given))


def config_json(d: Description) -> dict[str, Any]:
    return _llama.json_of(d, d.mixer("attention")) | _llama.windows_json(d)
