"""The functions that transformers looks up in other packages, and what it runs where they are missing.

Since transformers 5.15, one decorator of its modeling files does this, ``use_kernel_func_from_hub_with_fallback``.
What it found is in the cells of the function that it returns, where every call reads it. Our function goes into these
cells, so that whoever holds the function, such as a model that exists already, calls ours.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

_DECORATOR = re.compile(
    r"^@use_kernel_func_from_hub_with_fallback\(\s*[\"'](\w+)[\"'],\s*[\"'](\w+)[\"']", re.MULTILINE
)
_CELLS = {"implementation", "torch_function", "applicable_params", "is_new_implementation", "func_name", "package"}


class Lookup:
    """One function of a module that transformers looks up.

    Attributes:
        function, package: the names that it is looked up by.
    """

    def __init__(self, wrapper: FunctionType):
        self.cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True))
        self.function: str = self.cells["func_name"].cell_contents
        self.package: str = self.cells["package"].cell_contents
        self.own = {name: self.cells[name].cell_contents for name in _CELLS}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs what runs now, without the keyword arguments that it does not know, as transformers does."""
        known = self.cells["applicable_params"].cell_contents
        return self.cells["implementation"].cell_contents(*args, **{k: v for k, v in kwargs.items() if k in known})

    def supply(self, ours: Callable[..., Any]) -> None:
        """Our function runs from now on, unless transformers has found the package's own."""
        if not self.own["is_new_implementation"]:
            self._write(ours, _parameters(ours), True)

    def restore(self) -> None:
        self._write(self.own["implementation"], self.own["applicable_params"], self.own["is_new_implementation"])

    def _write(self, implementation: Callable[..., Any], parameters: tuple[str, ...], new: bool) -> None:
        self.cells["implementation"].cell_contents = implementation
        self.cells["applicable_params"].cell_contents = parameters
        self.cells["is_new_implementation"].cell_contents = new


@functools.cache
def lookups_of(module: ModuleType) -> list[Lookup]:
    """Those of a modeling module of transformers, which has been imported whole."""
    found = []
    for value in list(vars(module).values()):
        for function in (value, getattr(value, "forward", None)):  # the package kernels makes modules of them
            if isinstance(function, FunctionType) and _CELLS.issubset(function.__code__.co_freevars):
                found.append(Lookup(function))
                break
    return found


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@functools.cache
def published() -> dict[str, list[tuple[str, str]]]:
    """Families of the transformers that is installed, and what each looks up: (function, package), from its sources.

    Raises:
        ImportError: transformers is not installed, or older than 5.15.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ImportError("accelerate needs the package transformers: pip install transformers")
    found = {}
    for path in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        if matches := _DECORATOR.findall(path.read_text(encoding="utf-8")):
            found[path.parent.name] = list(dict.fromkeys(matches))
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
