"""Falcon Mamba (Zuo et al. 2024, arXiv 2410.05355): Mamba with norms of B, C and Δ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._mamba import RULES, config_of, mamba_json, mamba_options

__all__ = ["ARCHITECTURE", "NAME", "RULES", "config", "config_json"]

NAME = "Falcon Mamba"
ARCHITECTURE = "FalconMambaForCausalLM"


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    norms = {"bcdt_norm": True, "bcdt_norm_eps": given.get("mixer_rms_eps", 1e-6)}
    return config_of(given, "mamba", mamba_options(given) | norms, tied=True)


def config_json(d: Description) -> dict[str, Any]:
    return mamba_json(d) | {"mixer_rms_eps": d.mixer("mamba").get("bcdt_norm_eps", 1e-6)}
