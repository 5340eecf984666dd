"""What llama.cpp's transformers have in common: attention with rotary positions and a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.keys import (
    ATTENTION,
    ENDS,
    EPS,
    Table,
    heads_read,
    heads_written,
    read,
    rope_read,
    rope_written,
    tied,
    written,
)
from ssmzoo.checkpoints.gguf.rules import attention_rules, ends_rules, mlp_rules, norm_rules
from ssmzoo.checkpoints.renaming import Rule

SIZES: Table = {"feed_forward_length": "intermediate_size", EPS: "rms_norm_eps"}

RULES: list[Rule] = [*ends_rules(), *norm_rules(), *attention_rules(), *mlp_rules()]


def keys_of(given: Mapping[str, Any]) -> dict[str, Any]:
    found = written(given, ENDS, SIZES) | heads_written(given) | rope_written(given, given["head_dim"])
    return found | {"context_length": ATTENTION}


def given_of(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    heads = heads_read(keys)
    return read(keys, ENDS, SIZES) | heads | rope_read(keys, heads["head_dim"]) | tied(names)
