"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with attention within a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _llama

NAME = "Mistral"
ARCHITECTURE = "MistralForCausalLM"
RULES = _llama.RULES


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    return _llama.config_of(given, {}, [given.get("sliding_window") is not None] * given["num_hidden_layers"])


def config_json(d: Description) -> dict[str, Any]:
    attention = d.mixer("attention")
    return _llama.json_of(d, attention) | {"sliding_window": attention.get("window")}
