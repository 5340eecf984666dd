"""Qwen3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures._qwen import given_of
from ssmzoo.checkpoints.gguf.architectures._qwen35 import keys_of as keys
from ssmzoo.checkpoints.gguf.architectures._qwen35 import rules_of
from ssmzoo.checkpoints.gguf.rules import mlp_rules
from ssmzoo.checkpoints.renaming import Rule

__all__ = ["ARCHITECTURE", "FAMILIES", "NAME", "given", "keys", "rules"]

NAME = "Qwen3.5"
ARCHITECTURE = "qwen35"
FAMILIES = ("qwen3_5_text",)


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return given_of(keys, names) | {"model_type": "qwen3_5_text"}


def rules(given: Mapping[str, Any]) -> list[Rule]:
    return [*rules_of(given), *mlp_rules()]
