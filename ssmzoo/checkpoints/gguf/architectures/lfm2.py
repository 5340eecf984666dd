"""LFM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures._lfm import given_of, rules
from ssmzoo.checkpoints.gguf.architectures._lfm import keys_of as keys

__all__ = ["ARCHITECTURE", "FAMILIES", "NAME", "given", "keys", "rules"]

NAME = "LFM2"
ARCHITECTURE = "lfm2"
FAMILIES = ("lfm2",)


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return given_of(keys, names) | {"model_type": "lfm2", "block_auto_adjust_ff_dim": False}
