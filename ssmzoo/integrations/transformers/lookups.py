"""The functions that transformers looks up in other packages, and what it runs where they are missing.

Since transformers 5.15, one decorator of its modeling files does this, ``use_kernel_func_from_hub_with_fallback``.
What it found is in the cells of the function that it returns, where every call reads it. Our function goes into these
cells, so that whoever holds the function, such as a model that exists already, calls ours. Before 5.17 the cells hold
less, and the sources tell the rest.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

_DECORATOR = re.compile(
    r"^@use_kernel_func_from_hub_with_fallback\(\s*[\"'](\w+)[\"'],\s*[\"'](\w+)[\"']", re.MULTILINE
)
_DECORATED = re.compile(_DECORATOR.pattern + r"[^)]*\)\n(?:@[^\n]*\n)*def (\w+)", re.MULTILINE)
_CELLS = ("implementation", "applicable_params", "is_new_implementation")  # what is written; the last since 5.16


class Lookup:
    """One function of a module that transformers looks up.

    Attributes:
        function, package: the names that it is looked up by.
    """

    def __init__(self, wrapper: FunctionType, function: str, package: str):
        self.function, self.package = function, package
        self.cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True))
        self.own = {name: self.cells[name].cell_contents for name in _CELLS if name in self.cells}
        self.own["torch_function"] = wrapper.__wrapped__  # type: ignore[attr-defined]
        self._found = self.own["implementation"] is not self.own["torch_function"]  # in the package

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs what runs now, without the keyword arguments that it does not know, as transformers does."""
        known = self.cells["applicable_params"].cell_contents
        return self.cells["implementation"].cell_contents(*args, **{k: v for k, v in kwargs.items() if k in known})

    def supply(self, ours: Callable[..., Any]) -> None:
        """Our function runs from now on, unless transformers has found the package's own."""
        if not self._found:
            self._write({"implementation": ours, "applicable_params": _parameters(ours), "is_new_implementation": True})

    def restore(self) -> None:
        self._write(self.own)

    def _write(self, contents: Mapping[str, Any]) -> None:
        for name in _CELLS:
            if name in self.cells:
                self.cells[name].cell_contents = contents[name]


@functools.cache
def lookups_of(module: ModuleType) -> list[Lookup]:
    """Those of a modeling module of transformers, which has been imported whole."""
    known, found = _decorated(module), []
    for value in list(vars(module).values()):
        for function in (value, getattr(value, "forward", None)):  # the package kernels makes modules of them
            if isinstance(function, FunctionType) and set(_CELLS[:2]).issubset(function.__code__.co_freevars):
                names = known.get(function.__name__)
                if names is not None and hasattr(function, "__wrapped__"):
                    found.append(Lookup(function, *names))
                break
    return found


def _decorated(module: ModuleType) -> dict[str, tuple[str, str]]:
    """What a modeling module looks up, (function, package), by the names of its own functions."""
    text = Path(module.__file__).read_text(encoding="utf-8") if module.__file__ else ""
    return {own: (function, package) for function, package, own in _DECORATED.findall(text)}


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@functools.cache
def installed_families() -> dict[str, Path]:
    """All families of the transformers that is installed, and the file with each one's model.

    Raises:
        ImportError: transformers is not installed.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ImportError("accelerate needs the package transformers: pip install transformers")
    found = sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py"))
    return {path.parent.name: path for path in found if path.stem == f"modeling_{path.parent.name}"}


@functools.cache
def published() -> dict[str, list[tuple[str, str]]]:
    """Those that look functions up, and what each looks up: (function, package), from its sources.

    Raises:
        ImportError: transformers is not installed, or older than 5.15.
    """
    found = {}
    for family, path in installed_families().items():
        if matches := _DECORATOR.findall(path.read_text(encoding="utf-8")):
            found[family] = list(dict.fromkeys(matches))
    if not found:
        import transformers

        raise ImportError(
            f"accelerate needs transformers 5.15 or newer, whose models look up their functions; here is "
            f"{transformers.__version__}"
        )
    return found


@functools.cache
def installed(package: str) -> bool:
    """Whether there is such a package, whose functions transformers then takes.

    One that :func:`ssmkernels.compat.install` stands for is none: transformers looks for what pip knows.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec has taken its place
        return True
    return spec is not None and spec.name == package
