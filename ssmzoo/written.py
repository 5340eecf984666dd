"""Whether classes are what they were written as, or somebody has replaced a method in one."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

_METHODS = (types.FunctionType, property, classmethod, staticmethod)
_CALLED = ("__call__", "__getattr__", "__getattribute__")  # of the methods with two underscores those that a call meets
# Those of PyTorch's base of all modules.
_THROUGH = ("__call__", "__getattr__", "forward", "_wrapped_call_impl", "_call_impl")
_through_all = operator.itemgetter(*_THROUGH)
_OF_MODULE = {"forward": "_forward_unimplemented", "__call__": "Module._wrapped_call_impl"}  # which have other names
_WITHOUT_GRADIENTS = torch.no_grad()(lambda: None).__code__


class Classes:
    """Classes as they are now, with those that they are derived from, up to PyTorch's own.

    Written for speed, as each token asks: what loops here is not Python's interpreter.
    """

    def __init__(self, kinds: Iterable[type]):
        self.kinds = frozenset(kinds)
        every = dict.fromkeys(chain.from_iterable(kind.__mro__[:-1] for kind in self.kinds))
        self._dicts = [vars(by) for by in every if by is not nn.Module]
        self._values = [*self._now()]

    def unchanged(self) -> bool:
        """Whether nobody has replaced, added or taken anything in one of them."""
        count = sum(map(len, self._dicts)) + len(_THROUGH)
        return count == len(self._values) and all(map(operator.is_, self._now(), self._values))

    def as_written(self) -> bool:
        """Whether each has the methods that it was written with."""
        return all(map(is_as_written, self.kinds))

    def _now(self) -> Iterator[Any]:
        return chain(
            chain.from_iterable(map(types.MappingProxyType.values, self._dicts)), _through_all(vars(nn.Module))
        )


def is_as_written(kind: type) -> bool:
    """Whether every method of a class is what the class that it has it from was written with.

    Of PyTorch's own base of all modules only what a call goes through counts, and of methods with two underscores.
    """
    seen = set()
    for by in kind.__mro__[:-1]:
        for name, value in vars(by).items():
            if name in seen:
                continue
            seen.add(name)
            if _counts(name) and (by is not nn.Module or name in _THROUGH) and not _is_own(value, by, name):
                return False
    return True


def has_own_method(kind: type, method: str) -> bool:
    """The same of one method, by its name."""
    by = next(each for each in kind.__mro__ if method in vars(each))
    return _is_own(vars(by)[method], by, method)


def defines(kind: type, method: str) -> type | None:
    """The class that wrote a method for this one: none derived from it, this one included, has a method of its own.

    None where one has, which the method then does not know of, or where nobody wrote it.
    """
    for each in kind.__mro__:
        if method in vars(each):
            return each
        if any(isinstance(value, _METHODS) and _counts(name) for name, value in vars(each).items()):
            return None
    return None


def is_method(kind: type, name: str) -> bool:
    """Whether a class has a method of this name."""
    return isinstance(getattr(kind, name, None), types.FunctionType)


def _counts(name: str) -> bool:
    """Whether a method may change what a call of a module gives; not its ``__init__``, say."""
    return not name.startswith("__") or name in _CALLED


def _is_own(value: Any, by: type, name: str) -> bool:
    """Whether a class was written with this value under this name, as far as functions go."""
    if isinstance(value, property):
        return all(_is_own(f, by, name) for f in (value.fget, value.fset, value.fdel) if f is not None)
    if isinstance(value, staticmethod | classmethod):
        return not isinstance(value.__func__, types.FunctionType) or _is_function_of(value.__func__, by, name)
    if isinstance(value, types.FunctionType):
        return _is_function_of(value, by, name)
    if isinstance(value, functools.cached_property):
        return _is_function_of(value.func, by, name)
    plain = isinstance(value, type | types.MemberDescriptorType)
    return plain or not (callable(value) or hasattr(value, "__get__"))  # a mock, say, in a method's place


def _is_function_of(function: Callable[..., Any], by: type, name: str) -> bool:
    while hasattr(function, "__wrapped__") and _decorates(function, by):
        function = function.__wrapped__
    written = _OF_MODULE.get(name, f"Module.{name}") if by is nn.Module else f"{by.__qualname__}.{name}"
    named = (
        getattr(function, "__module__", None) == by.__module__ and getattr(function, "__qualname__", None) == written
    )
    return named and not hasattr(function, "__wrapped__")


def _decorates(function: Callable[..., Any], by: type) -> bool:
    """Whether a decorator with which a class was written has made this: PyTorch's for no gradients, or one of ours."""
    module = getattr(function, "__globals__", {}).get("__name__", "")  # ``__module__`` is copied from what it wraps
    ours = all(name.startswith("ssmzoo.") for name in (module, by.__module__))
    return ours or getattr(function, "__code__", None) is _WITHOUT_GRADIENTS
