"""One implementation of an op: a module of the op's folder, and what the dispatcher has to know of it.

The module of implementation ``x`` is ``x.py``; ``x_step.py`` for an op that is one token of another, and
``external_x.py`` where x is another package. It has either

- ``compute(a)``: the op in PyTorch's own operators, which it differentiates itself; or
- ``forward(a, save)`` and perhaps ``backward``: kernels (:mod:`ssmkernels.core.operators`);

and beside them, each returning None where all is well,

- ``missing()``: what this machine lacks;
- ``unsupported(a)``: what the implementation cannot do about one call;
- ``prepared(a)``: the kernel's call, not made (:mod:`ssmkernels.native.prepared`), where a model's token may hold it;
- ``slow(a)``: why a later one does the call better, so that this one only runs where it is forced.

``a`` is the op's arguments as a named tuple. ``TRACEABLE = True`` says that compilers may look into ``compute``, as its
core is an operator already; ``traceable(a)`` says so of one call. ``LOSES_TANGENTS = True`` says that forward-mode
differentiation does not get through ``compute``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssmkernels.core.declaration import Declaration
from ssmkernels.core.operators import composed, kernel
from ssmkernels.core.written import gradient_wanted

EXTERNAL = frozenset({"mamba_ssm", "causal_conv1d", "flash_attn"})


def _nothing(*_: Any) -> str | None:
    return None


def _never(_: Any) -> bool:
    return False


@dataclass(frozen=True)
class Implementation:
    """``function`` takes the arguments as a named tuple and returns a tensor or a tuple of tensors.

    ``prepared`` gives its kernel's call instead (:mod:`ssmkernels.native.prepared`).
    """

    name: str
    function: Callable[[Any], Any]
    missing: Callable[[], str | None] = _nothing
    unsupported: Callable[[Any], str | None] = _nothing
    slow: Callable[[Any], str | None] = _nothing
    loses_tangents: bool = False
    prepared: Callable[[Any], Any] | None = None


def load(declared: Declaration, package: str, name: str, step: bool) -> Implementation:
    """Imports an implementation's module, and makes operators of what is in it."""
    module = importlib.import_module(f"{package}.{_module(name, step)}")
    unsupported = getattr(module, "unsupported", _nothing)
    if hasattr(module, "forward"):
        function = kernel(declared, name, module, functools.partial(_reference, package))
        if not hasattr(module, "backward"):
            unsupported = _without_gradient(unsupported)
    else:
        function = _step_of(module) if step else module.compute
        if not declared.mutates and not getattr(module, "TRACEABLE", False):
            function = composed(declared, name, function, getattr(module, "traceable", _never))
    return Implementation(
        name,
        function,
        getattr(module, "missing", _nothing),
        unsupported,
        getattr(module, "slow", _nothing),
        getattr(module, "LOSES_TANGENTS", False),
        getattr(module, "prepared", None),
    )


def _module(name: str, step: bool) -> str:
    if name == "reference":
        return name
    return f"external_{name}" if name in EXTERNAL else f"{name}_step" if step else name


def _step_of(module: Any) -> Callable[[Any], Any]:
    """One token by a reference: its own ``step``, or that of its recurrence."""
    return module.step if hasattr(module, "step") else module.compute.step


def _reference(package: str, a: Any) -> Any:
    return importlib.import_module(f"{package}.reference").compute(a)


def _without_gradient(unsupported: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def either(a: Any) -> str | None:
        return gradient_wanted(a) or unsupported(a)

    return either
