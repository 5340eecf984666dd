"""States of several tensors: a tuple in the public function, single tensors everywhere else.

An op declares ``bundles={"initial_state": ("initial_C", "initial_n"), "final_state": ("final_C", "final_n")}``. A
bundle among the function's parameters is a tuple of tensors that shapes, checks, implementations and gradients know one
by one, by the names of its parts. A bundle of results joins the op's last results in a tuple.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ssmkernels.core.binding import Binder

Bundles = Mapping[str, tuple[str, ...]]


def unbundled(signature: inspect.Signature, bundles: Bundles) -> inspect.Signature:
    """The signature with a parameter for each part of a bundle; those of an optional one are optional too."""
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name in bundles:
            kind = "Tensor" if parameter.default is inspect.Parameter.empty else "Tensor | None"
            parameters += [parameter.replace(name=part, annotation=kind) for part in bundles[parameter.name]]
        else:
            parameters.append(parameter)
    return signature.replace(parameters=parameters)


def bundled(op: str, function: Callable[..., Any], single: Callable[..., Any], bundles: Bundles) -> Callable[..., Any]:
    """The public function, which takes and returns tuples, around ``single``, which takes and returns their parts.

    ``single`` is its attribute ``unbundled``.
    """
    signature = inspect.signature(function)
    bind = Binder(signature)
    taken = {name: parts for name, parts in bundles.items() if name in signature.parameters}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(args, kwargs)
        for name, parts in taken.items():
            given |= _apart(op, name, given.pop(name), parts, signature.parameters[name].default is None)
        found = single(**given)
        return found if isinstance(found, Tensor) or len(taken) == len(bundles) else (found[0], tuple(found[1:]))

    call.unbundled = single  # type: ignore[attr-defined]
    single.__qualname__ = f"{function.__qualname__}.unbundled"  # where pickle finds it
    return call


def _apart(op: str, name: str, value: Any, parts: tuple[str, ...], optional: bool) -> dict[str, Any]:
    if value is None and optional:
        return dict.fromkeys(parts)
    tensors = isinstance(value, tuple | list) and all(isinstance(part, Tensor) for part in value)
    if not tensors or len(value) != len(parts):
        names = ", ".join(part.removeprefix(f"{name.removesuffix('state')}") for part in parts)
        came = type(value).__name__
        if isinstance(value, tuple | list):
            came = f"{came} of {len(value)}: ({', '.join(type(part).__name__ for part in value)})"
        raise TypeError(f"{op}: `{name}` must be a tuple of {len(parts)} tensors, ({names}); got {came}")
    return dict(zip(parts, value, strict=True))
