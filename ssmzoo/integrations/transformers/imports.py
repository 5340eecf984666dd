"""Modeling modules of transformers, those that are imported already and those to come."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

_MODELING = re.compile(r"transformers\.models\.(\w+)\.modeling_\w+")

Seen = Callable[[str, ModuleType], None]


def loaded() -> Iterator[tuple[str, ModuleType]]:
    """Those imported so far: family and module."""
    names = [name for name in list(sys.modules) if name.startswith("transformers.models.")]
    for name in names:
        match, module = _MODELING.fullmatch(name), sys.modules.get(name)
        if match and isinstance(module, ModuleType):
            yield match[1], module


def watch_imports(seen: Seen) -> None:
    """Calls ``seen(family, module)`` for every modeling module after its import from now on."""
    forget_imports()
    sys.meta_path.insert(0, _Finder(seen))


def forget_imports() -> None:
    """Undoes :func:`watch_imports`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: it has other finders look, and asks to be told when the module is complete."""

    def __init__(self, seen: Seen):
        self.seen = seen

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        match = _MODELING.fullmatch(fullname)
        if match is None:
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, match[1], self.seen)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs a module by its own loader, and leaves only that one behind."""

    def __init__(self, own: Any, family: str, seen: Seen):
        self.own, self.family, self.seen = own, family, seen

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.own.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        self.seen(self.family, module)
