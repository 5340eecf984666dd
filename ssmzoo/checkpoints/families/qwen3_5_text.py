"""The text part of Qwen3.5 (Qwen Team 2026): gated DeltaNet and gated attention three to one."""

from __future__ import annotations

from ssmzoo.checkpoints.families._qwen import config, rules_for

__all__ = ["NAME", "config", "rules_for"]

NAME = "Qwen3.5"
