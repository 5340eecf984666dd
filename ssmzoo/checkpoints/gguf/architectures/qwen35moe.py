"""Qwen3.5 with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures._qwen import EXPERT_RULES, EXPERTS, given_of
from ssmzoo.checkpoints.gguf.architectures._qwen35 import keys_of, rules_of
from ssmzoo.checkpoints.renaming import Rule

NAME = "Qwen3.5-MoE"
ARCHITECTURE = "qwen35moe"
FAMILIES = ("qwen3_5_moe_text",)


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return keys_of(given, EXPERTS)


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return given_of(keys, names, EXPERTS) | {"model_type": "qwen3_5_moe_text"}


def rules(given: Mapping[str, Any]) -> list[Rule]:
    return [*rules_of(given), *EXPERT_RULES]
