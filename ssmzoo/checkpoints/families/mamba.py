"""Mamba (Gu and Dao 2023, arXiv 2312.00752) as transformers stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._mamba import RULES, config_of, mamba_json, mamba_options

__all__ = ["ARCHITECTURE", "NAME", "RULES", "config", "config_json"]

NAME = "Mamba"
ARCHITECTURE = "MambaForCausalLM"


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    return config_of(given, "mamba", mamba_options(given), tied=True)


def config_json(d: Description) -> dict[str, Any]:
    return mamba_json(d)
