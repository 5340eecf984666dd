"""The header of a GGUF file: its keys, and where its tensors lie.

After the magic word, the version and two counts there are the keys with their values, the names, shapes and kinds of
tensors, and from the next multiple of the alignment on their numbers. All numbers are little-endian.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT, VOCABULARY = "general.alignment", "tokenizer."
AXES = 4  # of a tensor, at most
LONGEST = 2**16  # values of a list that is kept: there is one for each layer, at most

# Kind of value → how `struct` reads it; 8 is text and 9 a list.
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, TEXT, LIST = 6, 8, 9


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape, its kind of numbers, and which bytes of the file hold them."""

    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """All keys by their names, but for the vocabulary's lists, and all tensors by theirs."""

    keys: dict[str, Any]
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """The header of a file, in which every size is compared with the file's before memory is made for it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, is damaged, or has tensors of a kind that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights: {path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            return _Reader(file, size).header()
        except (_DamageError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no GGUF file that can be read, or is damaged: {error}") from None


class _DamageError(Exception):
    """What is wrong with a header, in words that follow the file's name."""


class _Reader:
    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            raise _DamageError(f"it does not begin with {MAGIC.decode()}")
        version = self.number("I")
        if version not in VERSIONS:
            raise _DamageError(f"it is of version {version}, and must be of {' or '.join(map(str, VERSIONS))}")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        keys: dict[str, Any] = {}
        for _ in range(n_keys):  # ends with the file, at the latest
            key = self.text()
            if key in keys:
                raise _DamageError(f"it has two keys {key!r:.80}")
            keys[key] = self.value(self.number("I"), key)
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name = self.text()
            if name in found:
                raise _DamageError(f"it has two tensors {name!r:.80}")
            axes = self.number("I")
            if axes > AXES:
                raise _DamageError(f"{name!r:.80} has {axes} axes, and may have {AXES}")
            shape = tuple(self.number("Q") for _ in range(axes))[::-1]
            found[name] = (shape, self.number("I"), self.number("Q"))
        return Header(keys, self._placed(found, keys.get(ALIGNMENT, 32)))

    def _placed(self, found: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: Any) -> dict[str, Stored]:
        """Tensors with the bytes of the file that hold them."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if type(alignment) is not int or alignment < 1:
            raise _DamageError(f"{ALIGNMENT} must be a whole number from 1 on; got {alignment!r:.80}")
        first = -(-self.file.tell() // alignment) * alignment
        tensors = {}
        for name, (shape, number, offset) in found.items():
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise _DamageError(f"{name!r:.80} has numbers of the unknown kind {number}") from None
            block, nbytes = GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise _DamageError(f"{name!r:.80} of shape {shape} cannot be of {kind.name}, in blocks of {block}")
            stored = Stored(shape, kind.name, first + offset, math.prod(shape) // block * nbytes)
            if stored.start + stored.nbytes > self.size:
                raise _DamageError(f"it ends before the numbers of {name!r:.80}")
            tensors[name] = stored
        end = 0
        for name, stored in sorted(tensors.items(), key=lambda item: item[1].start):
            if stored.start < end:  # many tensors in the same bytes would take far more memory than the file
                raise _DamageError(f"the numbers of {name!r:.80} begin within those of another tensor")
            end = stored.start + stored.nbytes
        return tensors

    def value(self, kind: int, key: str) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.plain(self.numbers(kind, 1), kind)[0]
        kind, n = self.number("I"), self.number("Q")
        if key.startswith(VOCABULARY):  # as objects of Python they would take many times the file's size
            return self.passed_over(kind, n)
        if n > LONGEST:
            raise _DamageError(f"{key!r:.80} has {n} values, and may have {LONGEST}")
        return [self.text() for _ in range(n)] if kind == TEXT else self.plain(self.numbers(kind, n), kind)

    def passed_over(self, kind: int, n: int) -> None:
        """A list that nothing here reads."""
        for _ in range(n if kind == TEXT else 0):  # ends with the file, at the latest
            self.skip(self.number("Q"))
        if kind != TEXT:
            self.skip(n * struct.calcsize(f"<{self.letter(kind)}"))

    def numbers(self, kind: int, n: int) -> list[Any]:
        letter = self.letter(kind)
        data = self.take(n * struct.calcsize(f"<{letter}"))
        return list(struct.unpack(f"<{n}{letter}", data))

    def letter(self, kind: int) -> str:
        if kind not in VALUES:
            raise _DamageError(f"it has a value of the unknown kind {kind}")
        return VALUES[kind]

    def plain(self, values: list[Any], kind: int) -> list[Any]:
        """Numbers of 32 bits as they were written: 1e-5, and not the float64 nearest to what 32 bits made of it."""
        import numpy as np

        return [float(str(np.float32(value))) for value in values] if kind == FLOAT32 else values

    def number(self, letter: str) -> int:
        size = struct.calcsize(f"<{letter}")
        return int(struct.unpack(f"<{letter}", self.take(size))[0])

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def take(self, n: int) -> bytes:
        self.has(n)
        return self.file.read(n)

    def skip(self, n: int) -> None:
        self.has(n)
        self.file.seek(n, os.SEEK_CUR)

    def has(self, n: int) -> None:
        if n > self.size - self.file.tell():
            raise _DamageError("it ends within its header")
