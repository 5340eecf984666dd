"""Any of our models as transformers stores it after ``import ssmzoo.integrations.transformers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.renaming import Rule

NAME = "ssmzoo"
ARCHITECTURE = "SsmzooForCausalLM"

RULES: list[Rule] = [(r"model\.(.*)", r"\1")]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    return dict(given["architecture"])


def config_json(d: Description) -> dict[str, Any]:
    return {"architecture": d.config.to_dict(), "tie_word_embeddings": d.tied}
