"""Qwen3-Next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures._qwen import (
    EXPERT_RULES,
    EXPERTS,
    ValueHeads,
    given_of,
    in_groups,
    keys_of,
    rules_of,
)
from ssmzoo.checkpoints.gguf.rules import OURS, block
from ssmzoo.checkpoints.renaming import Rule

NAME = "Qwen3-Next"
ARCHITECTURE = "qwen3next"
FAMILIES = ("qwen3_next",)


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return keys_of(given, EXPERTS)


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return given_of(keys, names, EXPERTS) | {"model_type": "qwen3_next"}


def rules(given: Mapping[str, Any]) -> list[Rule]:
    groups, heads = given["linear_num_key_heads"], given["linear_num_value_heads"]
    maps = [f"{OURS}mixer.{x}_proj.weight" for x in "ba"]
    return [
        (rf"{block()}ssm_ba\.weight", in_groups(maps, groups, heads // groups)),
        *rules_of(given, ValueHeads(1, heads)),
        *EXPERT_RULES,
    ]
