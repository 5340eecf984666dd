"""Shapes in letters: ``"b l d"``, alternatives as in ``"b l n | b l g n"``, and sums as in ``"w-1 d"``."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_TERM = re.compile(r"([+-]?)(\d*)([A-Za-z_]*)")


def expanded(shape: str, axes: int) -> tuple[list[str], ...]:
    """The alternatives as lists of letters, which nobody may change.

    In an input of so many axes, ``...`` stands for all but those beside it.
    """
    # Dynamo looks into what it traces, and warns of a cache that it passes over
    return _expand(shape, axes) if torch.compiler.is_compiling() else _expanded(shape, axes)


def _expand(shape: str, axes: int) -> tuple[list[str], ...]:
    found = []
    for alternative in shape.split("|"):
        letters = alternative.split()
        if letters[:1] == ["..."]:
            letters = [*(f"n{i}" for i in range(1, axes - len(letters) + 2)), *letters[1:]]
        found.append(letters)
    return tuple(found)


_expanded = functools.cache(_expand)


def size_of(expression: str, sizes: Mapping[str, Any]) -> Any:
    """The value of a letter, a number, or a sum of multiples of them.

    Raises:
        KeyError: a letter is not known.
    """
    if expression in sizes:
        return sizes[expression]
    total = 0
    for sign, count, letter in _TERM.findall(expression)[:-1]:
        value = (int(count) if count else 1) * (sizes[letter] if letter else 1)
        total = total - value if sign == "-" else total + value
    return total


def learn(letters: Sequence[str], shape: Sequence[Any], sizes: dict[str, Any]) -> bool:
    """Whether a shape fits the letters; learns the sizes of new ones where it does."""
    learned = dict(sizes)
    for letter, size in zip(letters, shape, strict=True):
        if letter not in learned and letter.isidentifier():
            learned[letter] = size
        elif size_of(letter, learned) != size:
            return False
    sizes.update(learned)
    return True


def pretty(shape: str) -> str:
    return " or ".join(f"({s.strip()})" for s in shape.split("|"))


def letters_of(shape: str) -> list[str]:
    """The letters that a shape is made of, each once."""
    found = (letter for _, _, letter in _TERM.findall(shape) if letter)
    return list(dict.fromkeys(found))
