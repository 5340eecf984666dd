"""Qwen3 (Qwen Team 2025, arXiv 2505.09388): Llama with a norm of each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _llama

NAME = "Qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
RULES = _llama.RULES


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    norms = {"qk_norm": True, "qk_norm_eps": given.get("rms_norm_eps", 1e-6)}
    return _llama.config_of({"head_dim": 128} | dict(given), norms, _llama.windowed_layers(given))


def config_json(d: Description) -> dict[str, Any]:
    return _llama.json_of(d, d.mixer("attention")) | _llama.windows_json(d)
