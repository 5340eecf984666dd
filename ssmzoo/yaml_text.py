"""YAML texts as plain data and back; those from outside are bounded in size, depth and count before they are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ssmzoo.plain import MAX_DEPTH, MAX_VALUES, SHOWN

MAX_CHARACTERS = 2**20  # of one YAML text


def dump_yaml(values: Any) -> str:
    """Plain data as YAML, in the order that it has."""
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says, as plain data.

    Raises:
        ValueError: it is no YAML, or too long, too deep, or too large once its aliases are written out.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{where} must be at most {MAX_CHARACTERS} characters of YAML; got {len(text)}")
    try:
        _check_events(text, where)
        return yaml.safe_load(text)
    except (yaml.YAMLError, OverflowError) as error:
        raise _invalid(where, error) from None
    except ValueError as error:
        if isinstance(error, _Refused):
            raise ValueError(str(error)) from None
        raise _invalid(where, error) from None  # a date or a number that Python cannot hold


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or is refused by :func:`parse_yaml`.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of config keys; got {type(values).__name__}")
    return values


class _Refused(ValueError):
    """A text that is YAML, and is refused for its size."""


def _invalid(where: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split())
    return ValueError(f"{where} is no valid YAML: {said if len(said) <= 300 else said[:300] + '...'}")


def _check_events(text: str, where: str) -> None:
    """Counts what the text stands for, event by event, before any of it is built."""
    sizes: dict[str, int] = {}  # values behind each anchor, aliases written out
    stack: list[tuple[str | None, int]] = []  # anchor and values of each collection that is still open
    open_anchors: set[str | None] = set()
    total = 0  # values so far, at the current level and below
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, total))
            if event.anchor is not None:
                open_anchors.add(event.anchor)
            total += 1
            if len(stack) > MAX_DEPTH:
                raise _Refused(f"{where} must not nest deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = stack.pop()
            if anchor is not None:
                open_anchors.discard(anchor)
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            name = event.anchor or ""
            if name in open_anchors:
                raise _Refused(f"{where} must not hold itself; the alias *{name[:SHOWN]} stands inside its anchor")
            total += sizes.get(name, 1)
        if total > MAX_VALUES:
            raise _Refused(f"{where} must not hold more than {MAX_VALUES} values, with aliases written out")
