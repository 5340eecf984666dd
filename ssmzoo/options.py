"""Checks of named options against the type annotations of whoever takes them: mixers, configs, training settings."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ssmkernels.core.names import unknown
from ssmzoo.plain import is_finite, short


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword options of a class or function: all its parameters but ``self`` and ``d_model``."""
    parameters = list(inspect.signature(_spelled_out(function)).parameters.values())
    return {p.name: p for p in parameters if p.name not in ("self", "d_model") and p.kind is not p.VAR_KEYWORD}


def _spelled_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """What spells out the options: the function, a class's ``__init__``, or that of the dataclass of its options."""
    target = getattr(function, "options_class", None) or function
    return target.__init__ if isinstance(target, type) else target  # type: ignore[misc]


def check_options(what: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their values checked, and converted where that is safe (an int for a float, a list for a tuple).

    Raises:
        TypeError: an option that does not exist, with those that do and the nearest; or a value of the wrong type.
    """
    known = options_of(function)
    target = getattr(function, "options_class", None)
    hints = typing.get_type_hints(_spelled_out(function) if target is None else target)
    for name in options:
        if name not in known:
            raise TypeError(unknown(f"option of {what}", name, known))
    checked = {}
    for name, value in options.items():
        where = f"option `{name}` of {what}"
        checked[name] = check_range(where, name, convert(where, value, hints.get(name, Any)))
    return checked


def convert(where: str, value: Any, annotation: Any) -> Any:
    """``value`` as the annotated type.

    Converts an int, or text such as ``1e-3`` (which YAML reads as text), to a float, and a list to a tuple.

    Raises:
        TypeError: naming ``where``, what was expected and what came.
    """
    for option in _alternatives(annotation):
        fits, converted = _fit(value, option)
        if fits:
            return converted
    raise TypeError(f"{where} must be {_spell(annotation)}; got {short(value)}")


def check_range(where: str, name: str, value: Any) -> Any:
    """The value, if it is in the range that its name has wherever it is an option.

    Raises:
        ValueError: NaN under any name; or a norm's epsilon, a soft cap, a multiplier or a rotary base out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if name == "rope_base":
        fits, expected = value > 0 and is_finite(value), "a finite number above 0"
    elif name.endswith("multiplier"):
        fits, expected = is_finite(value), "a finite number"
    elif name.endswith(("softcap", "norm_eps")):
        fits, expected = value >= 0 and is_finite(value), "a finite number of at least 0"
    else:
        fits, expected = value == value, "a number"
    if not fits:
        raise ValueError(f"{where} must be {expected}; got {short(value)}")
    return value


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _fit(value: Any, annotation: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True, value
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(annotation)), value
    if annotation is None or annotation is type(None):
        return value is None, value
    if annotation is float:
        if isinstance(value, str):
            try:
                return True, float(value)
            except ValueError:
                return False, value
        if isinstance(value, int) and not isinstance(value, bool):
            return value.bit_length() <= 1000, value  # a larger one overflows a float
        return isinstance(value, float), value
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if (origin or annotation) is tuple:
        return isinstance(value, list | tuple), tuple(value) if isinstance(value, list | tuple) else value
    kind = origin or annotation
    return (isinstance(value, kind) if isinstance(kind, type) else True), value


def _spell(annotation: Any) -> str:
    names = []
    for option in _alternatives(annotation):
        if typing.get_origin(option) is typing.Literal:
            names += [repr(a) for a in typing.get_args(option)]
        elif option is None or option is type(None):
            names.append("None")
        else:
            names.append(getattr(typing.get_origin(option) or option, "__name__", str(option)))
    return " or ".join(names)
