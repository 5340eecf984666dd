"""The text part of Qwen3.5 (Qwen Team 2026): gated DeltaNet and gated attention three to one."""

from __future__ import annotations

from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._qwen import config, config_json_of, rules_for

__all__ = ["ARCHITECTURE", "NAME", "config", "config_json", "rules_for"]

NAME = "Qwen3.5"
ARCHITECTURE = "Qwen3_5ForCausalLM"


def config_json(d: Description) -> dict[str, Any]:
    return config_json_of(d) | {"num_experts": 0}  # experts have no place
