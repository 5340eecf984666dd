"""Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures._transformer import RULES, given_of
from ssmzoo.checkpoints.gguf.architectures._transformer import keys_of as keys
from ssmzoo.checkpoints.renaming import Rule

__all__ = ["ARCHITECTURE", "FAMILIES", "NAME", "given", "keys", "rules"]

NAME = "Qwen2"
ARCHITECTURE = "qwen2"
FAMILIES = ("qwen2",)


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return given_of(keys, names) | {"model_type": "qwen2"}


def rules(given: Mapping[str, Any]) -> list[Rule]:
    return RULES
