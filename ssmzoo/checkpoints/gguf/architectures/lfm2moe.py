"""LFM2 with experts in all layers but the first few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures._lfm import given_of, keys_of, rules
from ssmzoo.checkpoints.gguf.keys import SIGMOID, Table, check_scores, read, written

__all__ = ["ARCHITECTURE", "FAMILIES", "NAME", "given", "keys", "rules"]

NAME = "LFM2-MoE"
ARCHITECTURE = "lfm2moe"
FAMILIES = ("lfm2_moe",)

EXPERTS: Table = {
    "leading_dense_block_count": "num_dense_layers",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return keys_of(given) | written(given, EXPERTS) | {"expert_gating_func": SIGMOID}


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    check_scores(keys)
    return given_of(keys, names) | read(keys, EXPERTS) | {"model_type": "lfm2_moe"}
