"""Mixers by name. A file ``mixers/x.py`` is the mixer ``x``: found by itself, imported when first asked for."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ssmkernels.core.names import unknown
from ssmzoo.mixer import Mixer
from ssmzoo.options import check_options, options_of

MIXERS = "ssmzoo.mixers"  # the package in which each file is a mixer

M = TypeVar("M", bound=type[Mixer])

_registered: dict[str, type[Mixer]] = {}


@dataclass(frozen=True)
class MixerInfo:
    """What is known of a mixer without building it.

    ``needs`` names packages beyond PyTorch, ``missing`` those of them that are not installed; ``options`` maps each
    option to its default.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    missing: tuple[str, ...]
    options: dict[str, Any]

    @property
    def available(self) -> bool:
        return not self.missing


def register_mixer(name: str) -> Callable[[M], M]:
    """Class decorator: makes a :class:`Mixer` known by ``name``, to :func:`build_mixer` and in every config.

    Raises:
        TypeError: it decorates something that is no Mixer.
        ValueError: the name is taken by another class, or is no word.
    """
    if not name.replace("-", "_").isidentifier():
        raise ValueError(f"register_mixer: `name` must be a word of letters, digits, - and _; got {name!r}")

    def register(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Mixer)):
            raise TypeError(f"register_mixer({name!r}): `cls` must be a subclass of ssmzoo.Mixer; got {cls!r}")
        known = _registered.get(name)
        if name in _files() and cls.__module__ != f"{MIXERS}.{name}":
            raise ValueError(f"register_mixer: `name` {name!r} belongs to a mixer of ssmzoo; choose another")
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"register_mixer: `name` {name!r} is taken by {known.__module__}.{known.__qualname__}")
        _registered[name] = cls
        return cls

    return register


def mixer_class(name: str) -> type[Mixer]:
    """The class registered under a name.

    Raises:
        ValueError: no such mixer; says which there are and the nearest.
        ImportError: it needs a package that is not installed.
    """
    cls = _load(name)
    missing = _missing(cls)
    if missing:
        raise ImportError(f"mixer {name!r} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return cls


def build_mixer(name: str, d_model: int, **options: Any) -> Mixer:
    """A mixer on its own.

    Args:
        name: one of :func:`list_mixers`.
        d_model: width of its input and output.
        options: its keyword options, checked by name and type.

    Raises:
        ValueError, TypeError: an unknown mixer or option (with what exists and the nearest), or a value that does not
            fit.
    """
    cls = mixer_class(name)
    return cls(d_model, **check_options(f"mixer {name!r}", cls, options))


def list_mixers() -> dict[str, MixerInfo]:
    """Every mixer by name, with its options, what it needs and whether that is here."""
    found = {}
    for name in sorted({*_files(), *_registered}):
        cls = _load(name)
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        options = {option: p.default for option, p in options_of(cls).items()}
        found[name] = MixerInfo(name, summary, cls.requires, _missing(cls), options)
    return found


def _load(name: str) -> type[Mixer]:
    if name not in _registered:
        if name not in _files():
            raise ValueError(unknown("mixer", name, {*_files(), *_registered}))
        module = importlib.import_module(f"{MIXERS}.{name}")
        if name not in _registered:
            raise ImportError(f"{module.__file__} must hold a class under @register_mixer({name!r})")
    return _registered[name]


def _files() -> set[str]:
    modules = pkgutil.iter_modules(importlib.import_module(MIXERS).__path__)
    return {module.name for module in modules if not module.name.startswith("_")}


def _missing(cls: type[Mixer]) -> tuple[str, ...]:
    return tuple(package for package in cls.requires if importlib.util.find_spec(package) is None)
