"""The nested data behind a config: entries by name, which of them a pattern reaches, and overrides merged into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssmzoo.options import convert
from ssmzoo.plain import MAX_DEPTH, MAX_VALUES, short


def reachable(pattern: Any, mixers: Mapping[str, Any]) -> set[str]:
    """Names in the pattern, and those that parallel entries among them run."""
    found: set[str] = set()
    waiting = list(pattern) if isinstance(pattern, list | tuple) else []
    while waiting:
        entry = waiting.pop()
        if entry not in found:
            found.add(entry)
            branches = (mixers.get(entry) or {}).get("branches")
            waiting += branches if isinstance(branches, list | tuple) else []
    return found


def names(key: str, pattern: Sequence[Any]) -> list[str]:
    """The names of a pattern, which stands under ``key``.

    Raises:
        TypeError: one of them is no text.
    """
    return [convert(f"each entry of config key `{key}`", name, str) for name in pattern]


def named_options(key: str, entries: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Options by the names of the entries that stand under ``key``; None is no options.

    Raises:
        TypeError: a name that is no text, or options that are no dictionary.
    """
    return {
        convert(f"each name in config key `{key}`", name, str): dict(
            convert(f"config key `{key}.{name:.80}`", options, dict | None) or {}
        )
        for name, options in entries.items()
    }


def merge(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets the value at a path of keys. Dictionaries merge, everything else is replaced.

    Raises:
        ValueError: something on the path is not a dictionary.
    """
    key, *rest = path
    if rest:
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"config: `{key:.80}` is {short(inner)} and holds no key `{'.'.join(rest):.80}`")
        merge(inner, rest, value)
    elif isinstance(value, Mapping) and isinstance(values.get(key), dict):
        for inner_key, inner_value in value.items():
            merge(values[key], [inner_key], inner_value)
    else:
        values[key] = value


def check_nesting(pattern: Sequence[str], mixers: Mapping[str, Any]) -> None:
    """Refuses parallel entries that run themselves, nest too deep, or are too many once written out."""
    sizes: dict[str, int] = {}

    def written_out(entry: str, path: tuple[str, ...]) -> int:
        if entry in path:
            shown = " → ".join(name[:80] for name in (*path[path.index(entry) :], entry))
            raise ValueError(f"config: `mixers.{entry:.80}` must not run itself as a branch: {shown:.300}")
        if len(path) >= MAX_DEPTH:
            raise ValueError(f"config: the `branches` of `mixers.{path[0]:.80}` nest deeper than {MAX_DEPTH} levels")
        if entry not in sizes:
            branches = (mixers.get(entry) or {}).get("branches")
            inside = branches if isinstance(branches, list | tuple) else []
            names = [convert(f"each of the `branches` of `mixers.{entry:.80}`", name, str) for name in inside]
            sizes[entry] = 1 + sum(written_out(name, (*path, entry)) for name in names)
            if sizes[entry] > MAX_VALUES:
                raise ValueError(f"config: the `branches` of `mixers.{entry:.80}` run more than {MAX_VALUES} mixers")
        return sizes[entry]

    for entry in pattern:
        written_out(entry, ())
