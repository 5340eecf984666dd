"""Nemotron-H, without experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures._nemotron import given_of, keys_of, rules

__all__ = ["ARCHITECTURE", "FAMILIES", "NAME", "given", "keys", "rules"]

NAME = "Nemotron-H"
ARCHITECTURE = "nemotron_h"
FAMILIES = ("nemotron_h",)


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return keys_of(given, "mlp")


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return given_of(keys, names, "mlp")
