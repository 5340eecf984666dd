"""Which implementation of an op runs, and why.

An op has several implementations, fastest first, the readable reference last. A call takes the first one
that can run it; a name forces one. Nothing falls back silently: a forced implementation that cannot run is an
error that says why, and a large call that lands on the reference warns once.

Names come from, in this order: the ``implementation=`` argument, ``use(...)``, the environment variable
``SSMZOO_IMPLEMENTATION``. ``SSMZOO_DISABLE`` takes implementations out.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ssmkernels.core.autocast import autocasts
from ssmkernels.core.declaration import Declaration
from ssmkernels.core.explanation import Choice, Explained, Explanation
from ssmkernels.core.forcing import constant, disabled, environment
from ssmkernels.core.forcing import forced as _forced
from ssmkernels.core.implementation import EXTERNAL, Implementation, load
from ssmkernels.core.names import OPS, unknown
from ssmkernels.core.on_paper import KERNELS_OF, record, stands_for
from ssmkernels.core.plain import ZERO, filled, forward_differentiated, recorded, subclass, why_not_plain
from ssmkernels.core.sharded import call_on_shards, is_distributed
from ssmkernels.core.warn import warn

# Input elements from which a call on the reference is worth a warning: about a tenth of a second of it.
LARGE_CALL = 2**20

# Implementations that read a tensor's memory, unseen by PyTorch; all others are made of PyTorch's own operators.
KERNELS = frozenset({"triton", "cpu"}) | EXTERNAL

_loading = threading.RLock()  # an implementation's operators may be registered once only
_explaining: list[int] = []  # threads that want an explanation instead of a result
_warned: set[str] = set()


class Op:
    """An op: its declaration and its implementations, fastest first (:mod:`ssmkernels.core.implementation`)."""

    def __init__(self, declared: Declaration, package: str, implementations: tuple[str, ...], step: bool = False):
        self.name = declared.name
        self.declared = declared
        self.package = package
        self.names = implementations
        self.step = step
        self.batched = declared.batched
        self._loaded: dict[str, Implementation] = {}
        OPS[self.name] = self

    def implementation(self, name: str) -> Implementation:
        """The named implementation; imports its module on first use."""
        if name not in self.names:
            raise ValueError(unknown("implementation of " + self.name, name, self.names))
        if name not in self._loaded:
            with _loading:
                if name not in self._loaded:
                    self._loaded[name] = load(self.declared, self.package, name, self.step)
        return self._loaded[name]

    def why_not(self, name: str, a: Any = None) -> str:
        """Why the named implementation cannot run here, or cannot run a call with these arguments; empty if it can."""
        if disabled(self.name, name):
            return "disabled by SSMZOO_DISABLE"
        implementation = self.implementation(name)
        reason = implementation.missing()
        if reason is None and a is not None:
            reason = implementation.unsupported(a)
        return reason or ""

    def __call__(self, implementation: str | None, arguments: Mapping[str, Any]) -> Any:
        """Runs the op on validated arguments."""
        if torch.compiler.is_compiling():
            _load_all(self.name)
        elif reason := why_not_plain(arguments):
            if reason != ZERO:
                return self._call_transformed(reason, implementation, arguments)
            return self(implementation, filled(arguments))
        a = self.declared.Arguments(**arguments)
        if (kind := stands_for(a)) is not None:
            return record(self.implementation(self._on_paper(kind, a)), a)
        forced, origin = self._forced(implementation)
        if _explaining and threading.get_ident() in _explaining:
            raise Explained(self._explain(forced, origin, a), a)
        if forced is not None:
            reason = self.why_not(forced, a)
            if reason:
                raise ValueError(f"{self.name}: implementation {forced!r} ({origin}) cannot run this call: {reason}")
            return self._run(forced, a)
        name = self._fastest(a)
        if name is not None:
            if name == "reference" and len(self.names) > 1 and not torch.compiler.is_compiling():
                self._warn_if_large(a)
            return self._run(name, a)
        raise RuntimeError(f"{self.name}: no implementation can run this call\n{self._explain(None, '', a)}")

    def _call_transformed(self, reason: str, implementation: str | None, arguments: Mapping[str, Any]) -> Any:
        """Runs a call that PyTorch's own operators must carry: kernels read memory, and hide what they do.

        It takes the reference. Others made of PyTorch's operators run only where they are forced, as not all of them
        have rules for every transform.
        """
        if is_distributed(arguments):
            return call_on_shards(self.name, self.batched, arguments, functools.partial(self, implementation))
        a = self.declared.Arguments(**arguments)
        forced, origin = self._forced(implementation)
        name = forced or "reference"
        if _explaining and threading.get_ident() in _explaining:
            able = tuple(n for n in self.names if n not in KERNELS)
            other = f"{name!r} takes such calls; this one runs where it is forced"
            choices = tuple(Choice(n, reason if n in KERNELS else "" if n == name else other) for n in self.names)
            raise Explained(Explanation(self.name, name, reason, choices, able), a)
        unable = f"{self.name}: implementation {forced!r} ({origin}) cannot run this call"
        if name in KERNELS or (self.implementation(name).loses_tangents and forward_differentiated(arguments)):
            raise ValueError(f'{unable}: {reason}; use("reference") can')
        if forced is not None and (why_not := self.why_not(forced, a)):
            raise ValueError(f"{unable}: {why_not}")
        wrapped = None if recorded() else subclass(arguments)
        if wrapped and any(isinstance(a, torch.Tensor) and a.is_complex() for a in arguments.values()):
            # PyTorch puts conjugates off; what reaches a subclass has lost them
            kind = type(arguments[wrapped]).__name__
            raise TypeError(f"{self.name}: `{wrapped}` must be a plain tensor beside complex ones; got a {kind}")
        try:
            return self._run(name, a)
        except RuntimeError as error:
            if name == "reference":
                raise
            told = " ".join(str(error).split())
            raise RuntimeError(f'{unable}: {reason}; use("reference") can. PyTorch says: {told[:300]}') from error

    def _on_paper(self, kind: str, a: Any) -> str:
        """The implementation that a device of this kind, which need not be there, would run.

        PyTorch's own attention stands aside for the kernel: both keep the same for the backward pass.
        """
        for name in self.names:
            if (name in KERNELS and name != KERNELS_OF[kind]) or name == "sdpa":
                continue
            implementation = self.implementation(name)
            if implementation.unsupported(a) is None and implementation.slow(a) is None:
                return name
        return "reference"

    def _fastest(self, a: Any) -> str | None:
        """The first that can run the call and is not slow at it; a slow one rather than the reference."""
        slow = None
        for name in self.names:
            if self.why_not(name, a):
                continue
            if self.implementation(name).slow(a):
                slow = slow or name
            else:
                return slow if slow and name == "reference" else name
        return slow

    def _run(self, name: str, a: Any) -> Any:
        """Calls the implementation out of autocast's reach: an op chooses the precision of its sums itself."""
        function = self.implementation(name).function
        tensors = [x for x in a if isinstance(x, torch.Tensor)]
        if not torch.compiler.is_compiling() and True in [x.is_neg() for x in tensors]:
            # PyTorch puts off the sign of such views as x.conj().imag; kernels read memory
            a = self.declared.Arguments(*(x.resolve_neg() if isinstance(x, torch.Tensor) else x for x in a))
        kind = tensors[0].device.type if tensors else "cpu"
        if not autocasts(kind):
            return function(a)
        with torch.autocast(kind, enabled=False):
            return function(a)

    def _forced(self, implementation: str | None) -> tuple[str | None, str]:
        if implementation is not None:
            if implementation not in self.names:
                raise ValueError(unknown("implementation of " + self.name, implementation, self.names))
            return implementation, "by the argument `implementation`"
        name = _forced.get(self.name) or _forced.get("*")
        if name in self.names:
            return name, "by ssmkernels.use"
        name = environment(self.name)
        if name in self.names:
            return name, "by SSMZOO_IMPLEMENTATION"
        return None, "the fastest that can run this call"

    def _explain(self, forced: str | None, origin: str, a: Any) -> Explanation:
        choices = [Choice(name, self.why_not(name, a)) for name in self.names]
        able = [c.implementation for c in choices if not c.reason]
        chosen = forced if forced is not None else (self._fastest(a) or "nothing")
        if forced is not None:
            choices = [c if c.reason else c._replace(reason=f"{forced!r} is forced {origin}") for c in choices]
            if forced not in able:
                origin += ", but it cannot: " + self.why_not(forced, a)
        else:
            slower = f"slower than {chosen!r}"
            slow = {name: self.implementation(name).slow(a) for name in able}
            choices = [c if c.reason else c._replace(reason=slow[c.implementation] or slower) for c in choices]
        return Explanation(self.name, chosen, origin, tuple(choices), tuple(able))

    def _warn_if_large(self, a: Any) -> None:
        elements = sum(x.numel() for x in a if isinstance(x, torch.Tensor))
        if elements < LARGE_CALL or self.name in _warned:
            return
        _warned.add(self.name)
        why = "; ".join(f"{n}: {self.why_not(n, a)}" for n in self.names if n != "reference")
        warn(
            f"{self.name}: a large call runs on the slow reference ({why}). Force it with implementation='reference' "
            f"to silence this; it is said once.",
            RuntimeWarning,
        )


@constant
def _load_all(op: str) -> None:
    """Imports the op's implementations, which no compiler can do while it traces."""
    for name in OPS[op].names:
        OPS[op].implementation(name)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which implementation ``op(*args, **kwargs)`` would run, and why each other one would not. Runs nothing.

    Args:
        op: an op's name, or the public function itself.

    Raises:
        ValueError, TypeError: whatever the call itself would raise for bad arguments.
    """
    return looked_at(op, *args, **kwargs).explanation


def looked_at(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explained:
    """What :func:`explain` says, with the arguments that the chosen implementation would get."""
    if isinstance(op, str):
        if op not in OPS:
            raise ValueError(unknown("op", op, OPS))
        op = getattr(importlib.import_module(OPS[op].package), op)
    _explaining.append(threading.get_ident())
    try:
        op(*args, **kwargs)  # type: ignore[operator]
    except Explained as answer:
        return answer.with_traceback(None)  # which holds the frames of all callers, and they hold the answer
    finally:
        _explaining.remove(threading.get_ident())
    raise TypeError(f"explain: `op` must be an op of ssmkernels, or its name; got {op!r}")
