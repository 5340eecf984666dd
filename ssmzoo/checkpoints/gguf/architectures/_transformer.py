"""What llama.cpp's transformers have in common: attention with rotary positions and a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf import keys as gguf
from ssmzoo.checkpoints.gguf.rules import attention_rules, ends_rules, mlp_rules, norm_rules
from ssmzoo.checkpoints.renaming import Rule

SIZES: gguf.Table = {"feed_forward_length": "intermediate_size", gguf.EPS: "rms_norm_eps"}

RULES: list[Rule] = [*ends_rules(), *norm_rules(), *attention_rules(), *mlp_rules()]


def keys_of(given: Mapping[str, Any]) -> dict[str, Any]:
    found = (
        gguf.written(given, gguf.ENDS, SIZES) | gguf.heads_written(given) | gguf.rope_written(given, given["head_dim"])
    )
    return found | {"context_length": gguf.ATTENTION}


def given_of(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    heads = gguf.heads_read(keys)
    return gguf.read(keys, gguf.ENDS, SIZES) | heads | gguf.rope_read(keys, heads["head_dim"]) | gguf.tied(names)
