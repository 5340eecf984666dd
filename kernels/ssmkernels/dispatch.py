"""Which implementation of an op runs, and why.

An op has several implementations, fastest first, the readable reference last. A call takes the first one
that can run it; a name forces one. Nothing falls back silently: a forced implementation that cannot run is an
error that says why, and a large call that lands on the reference warns once.

Names come from, in this order: the ``implementation=`` argument, ``use(...)``, the environment variable
``SSMZOO_IMPLEMENTATION``. ``SSMZOO_DISABLE`` takes implementations out.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from ssmkernels.library import opaque
from ssmkernels.plain import ZERO, filled, forward_differentiated, recorded, subclass, why_not_plain
from ssmkernels.sharded import call_on_shards, is_distributed

# Input elements from which a call on the reference is worth a warning: about a tenth of a second of it.
LARGE_CALL = 2**20

# Implementations that read a tensor's memory, unseen by PyTorch; all others are made of PyTorch's own operators.
KERNELS = frozenset({"triton", "cpu", "mamba_ssm", "causal_conv1d", "flash_attn"})

C = TypeVar("C", bound=Callable[..., Any])

OPS: dict[str, Op] = {}

# What each open `use` forces, the latest last: op name, or "*" for every op → implementation name. Process-wide, as
# autograd's threads need it.
_uses: list[dict[str, str]] = []
_forced: dict[str, str] = {}  # all of them together
_uses_lock = threading.Lock()
_explaining: list[int] = []  # threads that want an explanation instead of a result
_warned: set[str] = set()


class Choice(NamedTuple):
    """What became of one implementation in one call: ``reason`` is empty where it could run."""

    implementation: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call takes, and why each other one was passed over.

    ``chosen`` is the name of the one that would run; ``choices`` has every implementation, fastest first; ``able`` are
    those that could run the call.
    """

    op: str
    chosen: str
    origin: str
    choices: tuple[Choice, ...]
    able: tuple[str, ...]

    @property
    def reasons(self) -> dict[str, str]:
        """Implementation name → why it would not run; without the chosen one."""
        return {c.implementation: c.reason for c in self.choices if c.implementation != self.chosen}

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen} runs ({self.origin})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


class _Explained(Exception):
    """Carries an explanation out of a public function without running anything."""

    def __init__(self, explanation: Explanation):
        self.explanation = explanation


def _nothing(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``function`` takes the op's arguments by name and returns a tensor or a tuple of tensors. ``missing()`` says what
    this machine lacks, ``unsupported(arguments)`` what it cannot do about one call, ``slow(arguments)`` why a later one
    does it better, so that this one runs where it is forced alone; each returns None where all is well.
    """

    name: str
    function: Callable[..., Any]
    missing: Callable[[], str | None] = _nothing
    unsupported: Callable[[Mapping[str, Any]], str | None] = _nothing
    slow: Callable[[Mapping[str, Any]], str | None] = _nothing


class Op:
    """An op: its name and its implementations, fastest first.

    Implementation ``x`` lives in the module ``x`` of the op's own package, as a function of the op's name; beside it
    may stand ``missing()``, ``unsupported(arguments)`` and ``slow(arguments)`` (prefixed with ``step_`` for the op's
    step). ``fake`` computes empty outputs from the arguments: with it a plain PyTorch implementation becomes one opaque
    node under ``torch.compile``, backward included. ``batched`` maps arguments whose first axis is the batch to the
    least number of axes with which it is; distributed tensors may be split along it.
    """

    def __init__(
        self,
        name: str,
        package: str,
        implementations: tuple[str, ...],
        fake: Callable[..., Any] | None = None,
        batched: Mapping[str, int] | None = None,
    ):
        self.name = name
        self.package = package
        self.names = implementations
        self.fake = fake
        self.batched = batched or {}
        self._loaded: dict[str, Implementation] = {}
        OPS[name] = self

    def implementation(self, name: str) -> Implementation:
        """The named implementation; imports its module on first use."""
        if name not in self.names:
            raise ValueError(unknown("implementation of " + self.name, name, self.names))
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Implementation:
        module = importlib.import_module(f"{self.package}.{name}")
        function = getattr(module, self.name)
        if self.fake is not None and not getattr(function, "compiles", False):
            function = opaque(f"{self.name}_{name}", function, self.fake)
        prefix = "step_" if self.name.endswith("_step") else ""
        return Implementation(
            name,
            function,
            getattr(module, "missing", _nothing),
            getattr(module, prefix + "unsupported", _nothing),
            getattr(module, prefix + "slow", _nothing),
        )

    def why_not(self, name: str, arguments: Mapping[str, Any] | None = None) -> str:
        """Why the named implementation cannot run here, or cannot run this call; empty where it can."""
        if _disabled(self.name, name):
            return "disabled by SSMZOO_DISABLE"
        implementation = self.implementation(name)
        reason = implementation.missing()
        if reason is None and arguments is not None:
            reason = implementation.unsupported(arguments)
        return reason or ""

    def __call__(self, implementation: str | None, /, **arguments: Any) -> Any:
        """Runs the op on validated arguments."""
        if torch.compiler.is_compiling():
            _load_all(self.name)
        elif reason := why_not_plain(arguments):
            if reason != ZERO:
                return self._call_transformed(reason, implementation, arguments)
            return self(implementation, **filled(arguments))
        forced, origin = self._forced(implementation)
        if _explaining and threading.get_ident() in _explaining:
            raise _Explained(self._explain(forced, origin, arguments))
        if forced is not None:
            reason = self.why_not(forced, arguments)
            if reason:
                raise ValueError(f"{self.name}: implementation {forced!r} ({origin}) cannot run this call: {reason}")
            return self._run(forced, arguments)
        name = self._fastest(arguments)
        if name is not None:
            if name == "reference" and len(self.names) > 1 and not torch.compiler.is_compiling():
                self._warn_if_large(arguments)
            return self._run(name, arguments)
        raise RuntimeError(f"{self.name}: no implementation can run this call\n{self._explain(None, '', arguments)}")

    def _call_transformed(self, reason: str, implementation: str | None, arguments: Mapping[str, Any]) -> Any:
        """Runs a call that PyTorch's own operators must carry: kernels read memory, and hide what they do.

        It takes the reference. Others made of PyTorch's operators run only where they are forced, as not all of them
        have rules for every transform.
        """
        if is_distributed(arguments):
            return call_on_shards(self.name, self.batched, arguments, functools.partial(self, implementation))
        forced, origin = self._forced(implementation)
        name = forced or "reference"
        if _explaining and threading.get_ident() in _explaining:
            able = tuple(n for n in self.names if n not in KERNELS)
            other = f"{name!r} takes such calls; this one runs where it is forced"
            choices = tuple(Choice(n, reason if n in KERNELS else "" if n == name else other) for n in self.names)
            raise _Explained(Explanation(self.name, name, reason, choices, able))
        unable = f"{self.name}: implementation {forced!r} ({origin}) cannot run this call"
        if name in KERNELS or (self._loses_tangents(name) and forward_differentiated(arguments)):
            raise ValueError(f'{unable}: {reason}; use("reference") can')
        if forced is not None and (why_not := self.why_not(forced, arguments)):
            raise ValueError(f"{unable}: {why_not}")
        wrapped = None if recorded() else subclass(arguments)
        if wrapped and any(isinstance(a, torch.Tensor) and a.is_complex() for a in arguments.values()):
            # PyTorch puts conjugates off; what reaches a subclass has lost them
            kind = type(arguments[wrapped]).__name__
            raise TypeError(f"{self.name}: `{wrapped}` must be a plain tensor beside complex ones; got a {kind}")
        try:
            return self._run(name, arguments)
        except RuntimeError as error:
            if name == "reference":
                raise
            told = " ".join(str(error).split())
            raise RuntimeError(f'{unable}: {reason}; use("reference") can. PyTorch says: {told[:300]}') from error

    def _loses_tangents(self, name: str) -> bool:
        """Whether an implementation is an operator of ours in eager calls too, which forward mode passes over."""
        return getattr(self.implementation(name).function, "loses_tangents", False)

    def _fastest(self, arguments: Mapping[str, Any]) -> str | None:
        """The first that can run the call and is not slow at it; a slow one rather than the reference."""
        slow = None
        for name in self.names:
            if self.why_not(name, arguments):
                continue
            if self.implementation(name).slow(arguments):
                slow = slow or name
            else:
                return slow if slow and name == "reference" else name
        return slow

    def _run(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Calls the implementation out of autocast's reach: an op chooses the precision of its sums itself."""
        function = self.implementation(name).function
        tensors = [a for a in arguments.values() if isinstance(a, torch.Tensor)]
        if not torch.compiler.is_compiling() and True in [a.is_neg() for a in tensors]:
            # PyTorch puts off the sign of such views as x.conj().imag; kernels read memory
            arguments = {k: a.resolve_neg() if isinstance(a, torch.Tensor) else a for k, a in arguments.items()}
        kind = tensors[0].device.type if tensors else "cpu"
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(**arguments)
        with torch.autocast(kind, enabled=False):
            return function(**arguments)

    def _forced(self, implementation: str | None) -> tuple[str | None, str]:
        if implementation is not None:
            if implementation not in self.names:
                raise ValueError(unknown("implementation of " + self.name, implementation, self.names))
            return implementation, "by the argument `implementation`"
        name = _forced.get(self.name) or _forced.get("*")
        if name in self.names:
            return name, "by ssmkernels.use"
        name = _environment(self.name)
        if name in self.names:
            return name, "by SSMZOO_IMPLEMENTATION"
        return None, "the fastest that can run this call"

    def _explain(self, forced: str | None, origin: str, arguments: Mapping[str, Any]) -> Explanation:
        choices = [Choice(name, self.why_not(name, arguments)) for name in self.names]
        able = [c.implementation for c in choices if not c.reason]
        chosen = forced if forced is not None else (self._fastest(arguments) or "nothing")
        if forced is not None:
            choices = [c if c.reason else c._replace(reason=f"{forced!r} is forced {origin}") for c in choices]
            if forced not in able:
                origin += ", but it cannot: " + self.why_not(forced, arguments)
        else:
            slower = f"slower than {chosen!r}"
            slow = {name: self.implementation(name).slow(arguments) for name in able}
            choices = [c if c.reason else c._replace(reason=slow[c.implementation] or slower) for c in choices]
        return Explanation(self.name, chosen, origin, tuple(choices), tuple(able))

    def _warn_if_large(self, arguments: Mapping[str, Any]) -> None:
        elements = sum(a.numel() for a in arguments.values() if isinstance(a, torch.Tensor))
        if elements < LARGE_CALL or self.name in _warned:
            return
        _warned.add(self.name)
        why = "; ".join(f"{n}: {self.why_not(n, arguments)}" for n in self.names if n != "reference")
        warnings.warn(
            f"{self.name}: a large call runs on the slow reference ({why}). Force it with implementation='reference' "
            f"to silence this; it is said once.",
            RuntimeWarning,
            stacklevel=4,
        )


def unknown(what: str, name: object, known: Any) -> str:
    """The message for a name that does not exist: what does, and the nearest."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name)[:100], known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what}: {name!r:.100}.{hint} There are: {', '.join(known)}."


def _parse(text: str, variable: str) -> dict[str, str]:
    """``"tiled"`` or ``"selective_scan=tiled,attention=reference"`` → op name, or "*", → implementation name."""
    table = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, _, name = entry.rpartition("=")
        table[op or "*"] = name
    _check_table(table, variable)
    return table


def _check_table(table: Mapping[str, str], origin: str) -> None:
    every = {name for op in OPS.values() for name in op.names}
    for op, name in table.items():
        if op != "*" and op not in OPS:
            raise ValueError(f"{origin}: " + unknown("op", op, OPS))
        names = every if op == "*" else set(OPS[op].names)
        if name not in names:
            raise ValueError(
                f"{origin}: " + unknown("implementation" + ("" if op == "*" else " of " + op), name, names)
            )


def _constant(function: C) -> C:
    """``torch.compiler.assume_constant_result`` without its import of the whole compiler, a second of start-up.

    A compiler takes the environment as it stands while it traces: hence constants, and plain strings and bools.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _load_all(op: str) -> None:
    """Imports the op's implementations, which no compiler can do while it traces."""
    for name in OPS[op].names:
        OPS[op].implementation(name)


@_constant
def _environment(op: str) -> str | None:
    """The implementation that ``SSMZOO_IMPLEMENTATION`` names for this op."""
    text = os.environ.get("SSMZOO_IMPLEMENTATION")
    if not text:
        return None
    table = _parse(text, "SSMZOO_IMPLEMENTATION")
    return table.get(op) or table.get("*")


@_constant
def _disabled(op: str, implementation: str) -> bool:
    """Whether ``SSMZOO_DISABLE`` (``triton``, ``triton:selective_scan``, several by commas) takes it from this op."""
    text = os.environ.get("SSMZOO_DISABLE")
    if not text:
        return False
    found = False
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, only = entry.partition(":")
        if name == "reference":
            raise ValueError("SSMZOO_DISABLE: the reference cannot be disabled: the others are checked against it")
        _check_table({only or "*": name}, "SSMZOO_DISABLE")
        found |= name == implementation and only in ("", op)
    return found


@contextlib.contextmanager
def use(implementation: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Forces implementations for all calls inside the context, in every thread of the process.

    ``use("reference")`` holds for every op that has an implementation of that name, the others choose as ever;
    ``use(selective_scan="tiled")`` for one op. An inner context adds to an outer one. Threads may enter and leave
    theirs in any order; what the latest says counts.

    Raises:
        ValueError: no op, or no implementation, of that name exists.
    """
    table = dict(by_op)
    if implementation is not None:
        table["*"] = implementation
    _check_table(table, "ssmkernels.use")
    with _uses_lock:
        _uses.append(table)
        _combine()
    try:
        yield
    finally:
        with _uses_lock:  # by identity: another thread may have entered or left in between
            _uses[:] = [entry for entry in _uses if entry is not table]
            _combine()


def _combine() -> None:
    """Makes ``_forced`` what all open entries say; a later one that names every op overrides those before it."""
    combined: dict[str, str] = {}
    for table in _uses:
        combined = dict(table) if "*" in table else combined | table
    for op in _forced.keys() - combined.keys():
        del _forced[op]
    _forced.update(combined)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which implementation ``op(*args, **kwargs)`` would run, and why each other one would not. Runs nothing.

    Args:
        op: an op's name, or the public function itself.

    Raises:
        ValueError, TypeError: whatever the call itself would raise for bad arguments.
    """
    if isinstance(op, str):
        if op not in OPS:
            raise ValueError(unknown("op", op, OPS))
        op = getattr(importlib.import_module(OPS[op].package), op)
    _explaining.append(threading.get_ident())
    try:
        op(*args, **kwargs)  # type: ignore[operator]
    except _Explained as answer:
        return answer.explanation
    finally:
        _explaining.remove(threading.get_ident())
    raise TypeError(f"explain: `op` must be an op of ssmkernels, or its name; got {op!r}")
