"""Published models: how the ``config.json`` and the weights of each ``model_type`` of transformers become ours.

A file ``x.py`` here is the ``model_type`` x. It has ``NAME``, the model's name; ``config(given)``, our config's values
from what ``config.json`` holds; and ``RULES`` for the names of weights (:mod:`ssmzoo.checkpoints.renaming`), or
``rules(names)`` where they depend on which names there are, or ``rules_for(given)`` where they depend on sizes. For the
way back, ``ARCHITECTURE`` is the name of the model's class, and ``config_json(description)`` gives what ``config``
reads; ``MIXERS`` are rules by the pattern's entry, where several have weights of the same names; and
``rules_for_writing(given)`` are the rules where they depend on the config in that direction alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from ssmkernels.core.names import unknown
from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import at_layers
from ssmzoo.checkpoints.renaming import Rule


class Family(Protocol):
    """What a file here has."""

    NAME: str
    ARCHITECTURE: str
    RULES: Sequence[Rule]

    def config(self, given: Mapping[str, Any]) -> dict[str, Any]: ...

    def config_json(self, d: Description) -> dict[str, Any]: ...


def list_families() -> list[str]:
    """Every ``model_type`` that has a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def writable_families() -> list[str]:
    """Those of them in which a model can be written."""
    return [name for name in list_families() if hasattr(family(name), "config_json")]


def family(model_type: str) -> Family:
    """The family of a ``model_type``.

    Raises:
        ValueError: there is none; says which there are and the nearest.
    """
    if model_type not in list_families():
        raise ValueError(unknown("model_type", model_type, list_families()))
    return cast(Family, importlib.import_module(f"{__name__}.{model_type}"))


def rules_to_write(found: Family, given: Mapping[str, Any]) -> Sequence[Rule]:
    """The rules by which weights of a model get their published names.

    Args:
        found: the family.
        given: what its ``config.json`` will hold.
    """
    for name in ("rules_for_writing", "rules_for"):
        if hasattr(found, name):
            rules = list(getattr(found, name)(given))
            break
    else:
        rules = list(found.RULES)
    pattern = found.config(given)["pattern"]
    for entry, of_mixer in getattr(found, "MIXERS", {}).items():
        at = [i for i in range(given["num_hidden_layers"]) if pattern[i % len(pattern)] == entry]
        rules = at_layers(at, of_mixer) + rules
    return rules
