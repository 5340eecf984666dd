"""Llama, and what is built alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ssmzoo.checkpoints.gguf.architectures._transformer import RULES, given_of, keys_of
from ssmzoo.checkpoints.gguf.keys import Table, read, written
from ssmzoo.checkpoints.gguf.rules import paired_rules
from ssmzoo.checkpoints.renaming import Rule, Written

NAME = "Llama"
ARCHITECTURE = "llama"
FAMILIES = ("llama",)


LLAMA3: Table = {
    "rope.scaling.low_freq_factor": "low_freq_factor",
    "rope.scaling.high_freq_factor": "high_freq_factor",
    "rope.scaling.divisor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
DIVISORS = "rope_freqs.weight"  # of each frequency: all that llama.cpp reads of Llama 3's scaling; the keys are for us


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    rope = given["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return keys_of(given)
    return keys_of({**given, "rope_parameters": rope | {"rope_type": "default"}}) | written(rope, LLAMA3)


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    found = given_of(keys, names) | {
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }
    if DIVISORS in names and LLAMA3.keys() <= keys.keys():
        found["rope_parameters"] |= {"rope_type": "llama3", **read(keys, LLAMA3)}
        found["max_position_embeddings"] = round(
            keys["rope.scaling.divisor"] * keys["rope.scaling.original_context_length"]
        )
    return found


def rules(given: Mapping[str, Any]) -> list[Rule]:
    known: list[Rule] = [(r"rope_freqs\.weight", "")] if given["rope_parameters"]["rope_type"] == "llama3" else []
    return known + paired_rules(given["num_attention_heads"], given["num_key_value_heads"]) + RULES


def finished(given: Mapping[str, Any], tensors: list[Written]) -> list[Written]:
    """With what each frequency is divided by, where Llama 3 scales them."""
    rope, dim = given["rope_parameters"], given["head_dim"]
    if rope["rope_type"] != "llama3":
        return tensors
    frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return [*tensors, Written(DIVISORS, (1 / (kept + (1 - kept) / rope["factor"])).float(), ())]
