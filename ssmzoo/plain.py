"""Plain data from outside, nested lists and mappings: bounded in depth and count before anything walks it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

MAX_DEPTH = 32  # of lists and mappings inside each other
MAX_VALUES = 50_000  # with every alias counted as often as it is used
SHOWN = 80  # characters of a value in a message


def short(value: object, most: int = SHOWN) -> str:
    """The value as an error message shows it: its ``repr``, cut where it is long, and quick for any size."""
    if isinstance(value, str | bytes):
        text = repr(value[:most])
        return text if len(value) <= most else f"{text}... ({len(value)} long)"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1024:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        try:
            check_plain(value, "value")
        except ValueError:
            return f"a {type(value).__name__} with {len(value)} entries"
    try:
        text = repr(value)
    except ValueError:  # an int inside with more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def is_finite(value: float) -> bool:
    """Whether float64 holds a number; an int may be larger."""
    return abs(value) <= sys.float_info.max


def check_plain(value: object, where: str) -> None:
    """Refuses nested lists and mappings that are too deep, too many, or hold themselves.

    Raises:
        ValueError: naming ``where`` and the limit.
    """
    waiting, seen = [(value, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{where} must not nest deeper than {MAX_DEPTH} levels")
        if seen > MAX_VALUES:
            raise ValueError(f"{where} must not hold more than {MAX_VALUES} values")
        if isinstance(part, Mapping):
            inside = [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            inside = list(part)
        else:
            continue
        if len(inside) > MAX_VALUES:
            raise ValueError(f"{where} must not hold more than {MAX_VALUES} values")
        waiting += [(inner, depth + 1) for inner in inside]
