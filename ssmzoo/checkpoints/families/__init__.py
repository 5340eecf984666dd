"""Published hybrids: how the ``config.json`` and the weights of each ``model_type`` of transformers become ours.

A file ``x.py`` here is the ``model_type`` x. It has ``NAME``, the model's name; ``config(given)``, our config's values
from what ``config.json`` holds; and ``RULES`` for the names of weights (:mod:`ssmzoo.checkpoints.renaming`), or
``rules(names)`` where they depend on which names there are, or ``rules_for(given)`` where they depend on sizes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from ssmkernels.core.names import unknown
from ssmzoo.checkpoints.renaming import Rule


class Family(Protocol):
    """What a file here has."""

    NAME: str
    RULES: Sequence[Rule]

    def config(self, given: Mapping[str, Any]) -> dict[str, Any]: ...


def list_families() -> list[str]:
    """Every ``model_type`` that has a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def family(model_type: str) -> Family:
    """The family of a ``model_type``.

    Raises:
        ValueError: there is none; says which there are and the nearest.
    """
    if model_type not in list_families():
        raise ValueError(unknown("model_type", model_type, list_families()))
    return cast(Family, importlib.import_module(f"{__name__}.{model_type}"))
