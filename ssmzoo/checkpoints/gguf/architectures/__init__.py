"""llama.cpp's architectures that models of the zoo can have.

A file here has ``NAME``, the model's name; ``ARCHITECTURE``, llama.cpp's; and ``FAMILIES``, the ``model_type`` of the
:mod:`ssmzoo.checkpoints.families` by whose ``config.json`` it is described, on the way to and from a GGUF file:

- ``keys(given)``: what ``config.json`` says, as GGUF keys without the architecture's name;
- ``given(keys, names)``: the other way, with the names of the file's tensors. It gives what llama.cpp computes from
  them, whatever ``keys`` was given; where that is another model, it has no place in GGUF;
- ``rules(given)``: for the names of tensors (:mod:`ssmzoo.checkpoints.renaming`);
- ``FOLDED``, if need be: how keys of options end (:meth:`Description.values`) that are in the tensors' numbers;
- ``finished(given, tensors)``, if need be: what is written instead of what the rules give;
- ``gathered(given, weights)``, if need be: what the rules are given of a file's tensors, the other way.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from ssmkernels.core.names import unknown
from ssmzoo.checkpoints.renaming import Rule


class Architecture(Protocol):
    """What a file here has."""

    NAME: str
    ARCHITECTURE: str
    FAMILIES: Sequence[str]

    def keys(self, given: Mapping[str, Any]) -> dict[str, Any]: ...

    def given(self, keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]: ...

    def rules(self, given: Mapping[str, Any]) -> list[Rule]: ...


PLAIN = ("llama", "qwen2", "qwen3")  # of which others are extensions
TWINS = ("qwen35moe",)  # read, but not written: Qwen3-Next holds the same models


def architectures() -> list[Architecture]:
    """All of them, plain ones first, and last those whose models another one holds as well."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    names.sort(key=lambda name: (name not in PLAIN, name in TWINS, name))
    return [cast(Architecture, importlib.import_module(f"{__name__}.{name}")) for name in names]


def architecture(name: str) -> Architecture:
    """That of a name of llama.cpp's.

    Raises:
        ValueError: there is none; says which there are and the nearest.
    """
    found = {each.ARCHITECTURE: each for each in architectures()}
    if name not in found:
        raise ValueError(unknown("`general.architecture`", name, sorted(found)))
    return found[name]
