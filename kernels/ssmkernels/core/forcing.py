"""Which implementations a user forces or takes out: ``use(...)``, ``SSMZOO_IMPLEMENTATION`` and ``SSMZOO_DISABLE``."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ssmkernels.core.names import OPS, unknown

C = TypeVar("C", bound=Callable[..., Any])

# What each open `use` forces, the latest last: op name, or "*" for every op → implementation name. Process-wide, as
# autograd's threads need it.
_uses: list[dict[str, str]] = []
forced: dict[str, str] = {}  # all of them together
_uses_lock = threading.Lock()


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


def constant(function: C) -> C:
    """``torch.compiler.assume_constant_result`` without its import of the whole compiler, a second of start-up.

    A compiler takes the environment as it stands while it traces: hence constants, and plain strings and bools.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def environment(op: str) -> str | None:
    """The implementation that ``SSMZOO_IMPLEMENTATION`` names for this op."""
    text = os.environ.get("SSMZOO_IMPLEMENTATION")
    if not text:
        return None
    table = _parse(text, "SSMZOO_IMPLEMENTATION")
    return table.get(op) or table.get("*")


@constant
def disabled(op: str, implementation: str) -> bool:
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


def unforced() -> bool:
    """Whether every op takes the fastest implementation that can run its call."""
    return not (forced or os.environ.get("SSMZOO_IMPLEMENTATION") or os.environ.get("SSMZOO_DISABLE"))


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
    """Makes ``forced`` what all open entries say; a later one that names every op overrides those before it."""
    combined: dict[str, str] = {}
    for table in _uses:
        combined = dict(table) if "*" in table else combined | table
    for op in forced.keys() - combined.keys():
        del forced[op]
    forced.update(combined)
