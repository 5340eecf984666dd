"""Qwen3-Next (Qwen Team 2025): gated DeltaNet and gated attention three to one, with many small experts."""

from __future__ import annotations

from ssmzoo.checkpoints.families._qwen import config, rules_for
from ssmzoo.checkpoints.families._qwen import config_json_of as config_json

__all__ = ["ARCHITECTURE", "NAME", "config", "config_json", "rules_for"]

NAME = "Qwen3-Next"
ARCHITECTURE = "Qwen3NextForCausalLM"
