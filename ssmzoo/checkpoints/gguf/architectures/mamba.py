"""Mamba and Falcon Mamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.keys import ENDS, EPS, UNBOUNDED, Table, read, tied, written
from ssmzoo.checkpoints.gguf.rules import ends_rules, mamba_rules, norm_rules
from ssmzoo.checkpoints.renaming import Rule

NAME = "Mamba"
ARCHITECTURE = "mamba"
FAMILIES = ("mamba", "falcon_mamba")

SIZES: Table = {
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.time_step_rank": "time_step_rank",
    EPS: "layer_norm_epsilon",
}
NORMS = "ssm.dt_b_c_rms"


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return written(given, ENDS, SIZES) | {
        "context_length": UNBOUNDED,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "ssm.inner_size": given["intermediate_size"],
        NORMS: given["model_type"] == "falcon_mamba",
    }


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    found = read(keys, ENDS, SIZES) | tied(names) | {"intermediate_size": 2 * keys["embedding_length"]}
    if keys.get(NORMS, False):
        return found | {"model_type": "falcon_mamba", "mixer_rms_eps": keys[EPS]}
    return found | {"model_type": "mamba"}


def rules(given: Mapping[str, Any]) -> list[Rule]:
    return ends_rules() + norm_rules() + mamba_rules()
