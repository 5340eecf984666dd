"""LFM2, with and without experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf import keys as gguf
from ssmzoo.checkpoints.gguf.rules import (
    OURS,
    attention_rules,
    block,
    convolution,
    ends_rules,
    expert_rules,
    mlp_rules,
    norm_rules,
)
from ssmzoo.checkpoints.renaming import Rule

SIZES: gguf.Table = {
    "feed_forward_length": "intermediate_size",
    "shortconv.l_cache": "conv_L_cache",
    gguf.EPS: "norm_eps",
}


def keys_of(given: Mapping[str, Any]) -> dict[str, Any]:
    return (
        gguf.written(given, gguf.ENDS, SIZES)
        | gguf.heads_written(given, gguf.places(given).get("attention", []))
        | gguf.rope_written(given, given["head_dim"])
        | {"context_length": gguf.ATTENTION}
    )


def given_of(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    heads, at = gguf.heads_read(keys), gguf.attention_layers(keys)
    head_dim = keys["embedding_length"] // max(heads["num_attention_heads"], 1)
    return (
        gguf.read(keys, gguf.ENDS, SIZES)
        | heads
        | gguf.rope_read(keys, head_dim)
        | gguf.tied(names)
        | {
            "head_dim": head_dim,
            "layer_types": ["full_attention" if i in at else "conv" for i in range(keys["block_count"])],
        }
    )


def rules(given: Mapping[str, Any]) -> list[Rule]:
    at = gguf.places(given)
    convolutions = block(at.get("short_conv", []))
    return [
        *ends_rules("token_embd_norm"),  # llama.cpp's name of the last norm, in this architecture
        *norm_rules(),
        *attention_rules(at.get("attention", [])),
        (rf"{convolutions}shortconv\.conv\.weight", convolution(f"{OURS}mixer.conv.weight")),
        (rf"{convolutions}shortconv\.(in|out)_proj\.weight", rf"{OURS}mixer.\2_proj.weight"),
        *expert_rules(),
        *mlp_rules(),
    ]
