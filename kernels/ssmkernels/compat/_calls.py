"""Functions with the signatures of other packages, whose work another function does on the arguments by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ssmkernels.core.binding import Binder
from ssmkernels.core.declaration import named_tuple

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")


def compatible(compute: Callable[[Any], Any], implementation: str | None = None, **others: Any) -> Callable[[F], F]:
    """Decorates a function that is a signature and a docstring.

    Args:
        compute: does the work. It takes a named tuple of the arguments, with ``op``, the function's name for messages,
            and ``implementation`` beside them.
        others: what it takes in addition, and the function has not.
    """

    def decorate(function: F) -> F:
        return _calling(compute, implementation, function, inspect.signature(function), others)

    return decorate


def taking(
    compute: Callable[[Any], Any], takes: str, like: Callable[..., Any], **others: Any
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """As :func:`compatible`, for one of many functions whose parameters are the same but for their order.

    Args:
        takes: the names of all parameters in their order, ``*`` before those that are given by name alone.
        like: a function that has these parameters, but for those that the decorated one itself names.
        others: as for :func:`compatible`.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        signature = inspect.signature(function)
        known = inspect.signature(like).parameters | signature.parameters
        kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = []
        for name in takes.split():
            if name == "*":
                kind = inspect.Parameter.KEYWORD_ONLY
            else:
                parameters.append(known[name].replace(kind=kind))
        return _calling(compute, None, function, signature.replace(parameters=parameters), others)

    return decorate


def by_reference(name: str, function: F, compute: Callable[[Any], Any], /, **fixed: Any) -> F:
    """The same function by our references, under the name that it has in its package.

    Args:
        function: made by :func:`compatible` with the same ``compute``.
        fixed: values of arguments that the package's own has not.
    """
    call = _calling(compute, "reference", function, inspect.signature(function), fixed, name)
    call.__name__ = call.__qualname__ = name
    call.__doc__ = f":func:`{function.__name__}` by our references."
    return call


def _calling(
    compute: Callable[[Any], Any],
    implementation: str | None,
    function: F,
    signature: inspect.Signature,
    fixed: dict[str, Any],
    name: str = "",
) -> F:
    kept = [parameter for parameter in signature.parameters.values() if parameter.name not in fixed]
    signature = signature.replace(parameters=kept)
    bind = Binder(signature)
    others = {**fixed, "op": name or function.__name__, "implementation": implementation}
    Arguments = named_tuple(function.__name__, [*signature.parameters, *others])

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compute(Arguments(**bind(args, kwargs), **others))

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
