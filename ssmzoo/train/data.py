"""Training data: text files as arrays of token ids, split in two, and batches drawn from them."""

from __future__ import annotations

import codecs
import math
import os
import random
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ssmzoo.train.stored import Stored
from ssmzoo.train.vocabulary import Vocabulary, cut

MAPPED = 2**26  # bytes from which a file is read piece by piece, and not kept in memory
MANY = 20  # files from which whole files are held out
HEAD = 2**16  # bytes that decide whether a file is text
SKIPPED = frozenset({"__pycache__", "node_modules"})
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests"})

Source = str | os.PathLike[str]


class Tokens:
    """A long sequence of ids over several arrays, some of which may lie on disk."""

    def __init__(self, arrays: Sequence[np.ndarray | Stored]):
        self._arrays = [array for array in arrays if len(array)]
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def window(self, start: int, length: int) -> np.ndarray:
        """``length`` ids from ``start`` on."""
        parts = []
        i = int(np.searchsorted(self._ends, start, side="right"))
        while length > 0:
            offset = start - (int(self._ends[i - 1]) if i else 0)
            part = self._arrays[i][offset : offset + length]
            parts.append(part)
            start, length, i = start + len(part), length - len(part), i + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def width(self, length: int) -> int:
        """Tokens of one sequence."""
        return length

    def places(self, length: int) -> int:
        """How many windows :meth:`take` can choose from."""
        return len(self) - length

    def spread(self, most: int, length: int) -> np.ndarray:
        """Up to ``most`` starts of windows that lie evenly apart."""
        room = max(1, (len(self) - 1) // length)
        return np.linspace(0, len(self) - length - 1, min(most, room)).astype(np.int64)

    def take(self, places: np.ndarray, length: int, draw: np.random.Generator) -> Tensor:
        """The windows that start at some places, ``(b, length + 1)`` int64."""
        return torch.from_numpy(np.stack([self.window(int(s), length + 1) for s in places]).astype(np.int64))

    def fingerprint(self) -> str:
        """A number that another text will hardly share: length and checksum of 64 samples."""
        size, found = min(1024, len(self)), 0
        for start in np.linspace(0, len(self) - size, 64).astype(np.int64):
            found = zlib.crc32(self.window(int(start), size).astype(np.uint32).tobytes(), found)
        return f"{len(self)}-{found:08x}"


class Text(Protocol):
    """Tokens from which sequences are taken: :class:`Tokens`, or those of a corpus."""

    def __len__(self) -> int: ...

    def window(self, start: int, length: int) -> np.ndarray: ...

    def width(self, length: int) -> int: ...

    def places(self, length: int) -> int: ...

    def spread(self, most: int, length: int) -> np.ndarray: ...

    def take(self, places: np.ndarray, length: int, draw: np.random.Generator) -> Any: ...

    def fingerprint(self) -> str: ...


class Data(NamedTuple):
    """What a run trains on and what it is judged by.

    ``tokens_per_byte`` is of the held-out text; None where the data are ids without text.
    """

    train: Text
    validation: Text
    tokens_per_byte: float | None

    @property
    def unit(self) -> str:
        """What losses are counted by: "byte", or "token" where there is no text."""
        return "token" if self.tokens_per_byte is None else "byte"

    def bits(self, nats: float) -> float:
        """A loss in nats a token → in bits a unit."""
        return nats / math.log(2) * (1.0 if self.tokens_per_byte is None else self.tokens_per_byte)


def load_text(sources: Sequence[Source] | None, vocabulary: Vocabulary, held_out: float) -> Data:
    """Text files as ids.

    Args:
        sources: files, and folders, which are searched for text files down to the bottom, passing over hidden
            ones; None for the Python standard library's own source.
        vocabulary: turns text into ids.
        held_out: fraction that is held out: whole files, picked once and for all, where there are
            :data:`MANY`, else the end of each file.

    Raises:
        FileNotFoundError, ValueError: nothing there, no text in it, or a named file that is no UTF-8 text.
    """
    paths = standard_library() if sources is None else text_files(sources)
    texts = [_read(path) for path in paths]
    train: list[np.ndarray | Stored] = []
    validation: list[np.ndarray | Stored] = []
    if len(texts) >= MANY:
        random.Random(0).shuffle(texts)
        wanted = held_out * sum(map(len, texts))
        for text in texts:
            (validation if wanted > 0 else train).append(text)
            wanted -= len(text)
    else:
        for text in texts:
            place = cut(cast(np.ndarray, text), round(len(text) * (1 - held_out)))
            train.append(_part(text, slice(0, place)))
            validation.append(_part(text, slice(place, None)))
    held_out_bytes = sum(map(len, validation))
    train, validation = ([_encode(text, vocabulary) for text in _joined(part)] for part in (train, validation))
    held_out_tokens = sum(map(len, validation))
    return Data(Tokens(train), Tokens(validation), held_out_tokens / max(held_out_bytes, 1))


def load_ids(ids: Tensor | np.ndarray, held_out: float) -> Data:
    """Ids ``(n)`` of any integer dtype; the end of them is held out."""
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"train: `data` in an array must be integers of shape (n); got {array.dtype} {array.shape}")
    if len(array) and array.min() < 0:
        raise ValueError(f"train: `data` must hold token ids from 0 on; got {array.min()}")
    place = round(len(array) * (1 - held_out))
    return Data(Tokens([array[:place]]), Tokens([array[place:]]), None)


class Labelled(NamedTuple):
    """What a classifier is given, and should answer."""

    inputs: Tensor  # (b l) ids, or (b l d_input) features
    labels: Tensor  # (b)
    mask: Tensor | None  # (b l), True where there is a step; None if everywhere

    def to(self, device: torch.device) -> Labelled:
        """On a device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Labelled(self.inputs.to(device), self.labels.to(device), mask)


class Part(Protocol):
    """Data from which sequences of some length are taken: :class:`Tokens`, masked or not, or a classifier's examples.

    ``draw`` is for what is drawn within the sequences.
    """

    def places(self, length: int) -> int: ...

    def spread(self, most: int, length: int) -> np.ndarray: ...

    def take(self, places: np.ndarray, length: int, draw: np.random.Generator) -> Any: ...


def batch(part: Part, size: int, length: int, key: Sequence[int]) -> Any:
    """``size`` sequences from places that depend on ``key`` alone; of tokens ``(size, length + 1)``."""
    draw = np.random.default_rng(key)
    return part.take(draw.integers(0, part.places(length), size), length, draw)


def fixed_batches(part: Part, count: int, size: int, length: int) -> Iterator[Any]:
    """Up to ``count`` batches of up to ``size`` sequences, from places that lie evenly apart."""
    places = part.spread(count * size, length)
    for first in range(0, len(places), size):
        yield part.take(places[first : first + size], length, np.random.default_rng(first))


def text_files(sources: Sequence[Source]) -> list[Path]:
    """The text files that files and folders stand for, in a fixed order."""
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = [path for path in walk(source) if is_text(path)]
            if not inside:
                raise ValueError(f"the data folder {source} holds no text files; name a folder or files that do")
            found += inside
        elif not source.exists():
            raise FileNotFoundError(f"no data file or folder {source}")
        elif source.stat().st_size == 0:
            raise ValueError(f"the data file {source} is empty")
        elif not is_text(source):
            raise ValueError(f"the data file {source} is not UTF-8 text; convert it first, or name another file")
        else:
            found.append(source)
    return found


def standard_library() -> list[Path]:
    """The source files of Python's standard library, without its tests: real text that every machine has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in walk(folder, SKIPPED | NOT_LIBRARY) if path.suffix == ".py" and is_text(path)]
    if not found:
        raise FileNotFoundError(f"this Python has no source of its standard library in {folder}: give text with --data")
    return found


def is_text(path: Path) -> bool:
    """Whether a file is not empty and starts as UTF-8 text, without zero bytes.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise ValueError(f"the data file {path} cannot be read: {error.strerror}") from None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError:
        return False
    return bool(head) and b"\0" not in head


def walk(folder: Path, skipped: frozenset[str] = SKIPPED) -> Iterator[Path]:
    """The files of a folder down to the bottom, in a fixed order, without hidden ones and some names."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith(".") or name in skipped:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from walk(path, skipped)
        elif path.is_file():
            yield path


def _read(path: Path) -> np.ndarray | Stored:
    return Stored(path) if path.stat().st_size >= MAPPED else np.fromfile(path, np.uint8)


def _part(text: np.ndarray | Stored, part: slice) -> np.ndarray | Stored:
    return text.part(part) if isinstance(text, Stored) else text[part]


def _joined(arrays: Sequence[np.ndarray | Stored]) -> list[np.ndarray | Stored]:
    """Few arrays in place of many; those on disk stay where they are."""
    return [
        np.concatenate([np.empty(0, np.uint8), *(a for a in arrays if isinstance(a, np.ndarray))]),
        *(a for a in arrays if isinstance(a, Stored)),
    ]


def _encode(text: np.ndarray | Stored, vocabulary: Vocabulary) -> np.ndarray | Stored:
    try:
        return vocabulary.encode_bytes(cast(np.ndarray, text))  # which takes slices of it
    except UnicodeDecodeError as error:
        raise ValueError(f"train: `data` must be UTF-8 text throughout ({error.reason}); convert it first") from None
