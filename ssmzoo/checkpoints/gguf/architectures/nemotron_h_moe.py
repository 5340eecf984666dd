"""Nemotron 3: Nemotron-H with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures._nemotron import EXPERTS, LATENT, given_of, keys_of, rules
from ssmzoo.checkpoints.gguf.keys import read, written

__all__ = ["ARCHITECTURE", "FAMILIES", "NAME", "given", "keys", "rules"]

NAME = "Nemotron 3"
ARCHITECTURE = "nemotron_h_moe"
FAMILIES = ("nemotron_h",)


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    latent = given[LATENT]
    return (
        keys_of(given, "moe")
        | written(given, EXPERTS)
        | ({} if latent is None else {LATENT: latent})
        | {"expert_shared_count": 1}
    )


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    norm, scale = keys.get("expert_weights_norm", False), keys.get("expert_weights_scale", 1.0) or 1.0
    found = {"expert_weights_norm": norm, "expert_weights_scale": scale}
    return given_of(keys, names, "moe") | read({**keys, **found}, EXPERTS) | {LATENT: keys.get(LATENT)}
