"""Mamba-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.keys import ENDS, EPS, UNBOUNDED, Table, read, tied, written
from ssmzoo.checkpoints.gguf.rules import ends_rules, mamba2_rules, norm_rules
from ssmzoo.checkpoints.renaming import Rule

NAME = "Mamba-2"
ARCHITECTURE = "mamba2"
FAMILIES = ("mamba2",)

SIZES: Table = {
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "num_heads",
    EPS: "layer_norm_epsilon",
}


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return written(given, ENDS, SIZES) | {
        "context_length": UNBOUNDED,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "ssm.inner_size": given["num_heads"] * given["head_dim"],
    }


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    inside = keys["ssm.inner_size"]
    return (
        read(keys, ENDS, SIZES)
        | tied(names)
        | {
            "model_type": "mamba2",
            "expand": inside / keys["embedding_length"],
            "head_dim": inside // keys["ssm.time_step_rank"],
        }
    )


def rules(given: Mapping[str, Any]) -> list[Rule]:
    return ends_rules() + norm_rules() + mamba2_rules(given["n_groups"])
