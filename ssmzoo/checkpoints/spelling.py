"""Rules for names read backwards: from our name to the published one."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How one name is spelled on both sides.

    Attributes:
        pattern: a regular expression of our name; the group ``gN`` is the rule's N.
        pieces: the published name, text and numbers of groups in turn.
    """

    pattern: str
    pieces: tuple[str | int, ...]

    def match(self, name: str) -> re.Match[str] | None:
        return re.fullmatch(self.pattern, name)

    def write(self, match: re.Match[str], more: Mapping[int, str] | None = None) -> str:
        """The published name, with ``more`` groups that our name does not have."""
        groups = {int(key[1:]): value for key, value in match.groupdict().items()} | dict(more or {})
        return "".join(piece if isinstance(piece, str) else groups[piece] for piece in self.pieces)

    def ours(self, match: re.Match[str], template: str) -> str:
        """Another of our names with the same groups."""
        return re.sub(r"\\(\d)", lambda reference: match[f"g{reference[1]}"], template)


@functools.lru_cache(maxsize=4096)
def spelling(pattern: str, ours: str) -> Spelling:
    """A rule's pattern and our name, turned round.

    Args:
        pattern: of the published name: text, groups, alternatives, classes such as ``[qkv]``, and optional groups.
        ours: with references ``\\1`` to groups of the pattern.
    """
    sources: list[str] = []
    referred = {int(number) for number in re.findall(r"\\(\d)", ours)}
    place = re.search(r"\[([\\\d,]+)\]$", ours)
    pieces = _pieces(pattern, sources, referred)
    found, seen = "", set()
    for i, part in enumerate(re.split(r"\\(\d)", ours[: place.start()] if place else ours)):
        if i % 2 == 0:
            found += re.escape(part)
        elif part in seen:
            found += f"(?P=g{part})"
        else:
            seen.add(part)
            found += f"(?P<g{part}>{sources[int(part) - 1]})"
    return Spelling(found, tuple(pieces))


def _pieces(pattern: str, sources: list[str], referred: set[int]) -> list[str | int]:
    """A pattern as text, by first alternatives, and groups that are referred to by their numbers."""
    found: list[str | int] = []
    i = 0
    while i < len(pattern):
        letter = pattern[i]
        if letter == "\\":
            found.append(pattern[i + 1])
            i += 2
        elif letter == "[":
            found.append(pattern[i + 1])
            i = pattern.index("]", i) + 1
        elif letter == "(":
            end = _closing(pattern, i)
            inside = pattern[i + 1 : end].removeprefix("?:")
            if pattern.startswith("(?:", i):
                found += _pieces(_first_alternative(inside), sources, referred)
            else:
                sources.append(inside)
                number = len(sources)
                found += [number] if number in referred else _pieces(_first_alternative(inside), [], set())
            i = end + 1 + pattern.startswith("?", end + 1)
        else:
            found.append(letter)
            i += 1
    return found


def _closing(pattern: str, start: int) -> int:
    """Where the bracket at ``start`` closes."""
    depth = 0
    for i in range(start, len(pattern)):
        escaped = i > 0 and pattern[i - 1] == "\\"
        depth += 0 if escaped else (pattern[i] == "(") - (pattern[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"`pattern` {pattern} has a bracket that does not close")


def _first_alternative(pattern: str) -> str:
    depth = 0
    for i, letter in enumerate(pattern):
        depth += (letter == "(") - (letter == ")")
        if letter == "|" and depth == 0:
            return pattern[:i]
    return pattern
