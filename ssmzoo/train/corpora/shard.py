"""Writing a shard: the documents of a part, encoded, with little of them in memory at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssmzoo.checkpoints.checksums import checksum
from ssmzoo.files import replacing
from ssmzoo.train.corpora.manifest import ENDS, IDS, Shard, read_sealed, sizes, write_sealed
from ssmzoo.train.corpora.sources import Part, documents
from ssmzoo.train.vocabulary import Vocabulary, open_vocabulary

BATCH = 2**20  # characters encoded at once
RECORD = ".json"  # what a shard is, until the manifest says it


@dataclasses.dataclass(frozen=True)
class Job:
    """How parts become shards; it can be sent to another process.

    Attributes:
        folder: of the corpus.
        tokenizer: a file of the `tokenizers` library; None for bytes.
        key: the name of the text in JSON and tables.
        end: the id after each document; None for none.
    """

    folder: Path
    tokenizer: Path | None
    key: str
    end: int | None

    def __call__(self, task: tuple[int, Part]) -> tuple[int, Shard]:
        """Writes the shard of a part, its record last; returns the part's number and the shard."""
        number, part = task
        name = f"{number:05d}"
        vocabulary = _vocabulary(self.tokenizer, None if self.tokenizer is None else self.tokenizer.stat().st_mtime_ns)
        tokens = size = 0
        ends = array("q")
        with replacing(self.folder / (name + IDS)) as ids_path, replacing(self.folder / (name + ENDS)) as ends_path:
            with ids_path.open("wb") as file:
                out = _Hashed(file)
                for ids, bytes_, last in _encoded(part, self.key, vocabulary):
                    out.write(ids)
                    tokens, size = tokens + len(ids), size + bytes_
                    if last and self.end is not None:
                        out.write(np.array([self.end], vocabulary.dtype))
                        tokens += 1
                    if last:
                        ends.append(tokens)
            with ends_path.open("wb") as file:
                out_ends = _Hashed(file)
                out_ends.write(np.array(ends, np.int64))
        shard = Shard(name, part.source, tokens, len(ends), size, out.hexdigest(), out_ends.hexdigest())
        write_sealed(self.folder / (name + RECORD), dataclasses.asdict(shard))
        return number, shard


def finished(folder: Path, number: int, dtype: str) -> Shard | None:
    """The shard of a part, if it has been written."""
    path = folder / f"{number:05d}{RECORD}"
    try:
        shard = Shard(**read_sealed(path))
        whole = all((folder / name).stat().st_size == size for name, size in sizes(shard, dtype).items())
    except (OSError, ValueError, TypeError):
        return None
    return shard if whole else None


def intact(folder: Path, shard: Shard) -> bool:
    """Whether a shard's files have their checksums."""
    wanted = {shard.name + IDS: shard.ids_checksum, shard.name + ENDS: shard.ends_checksum}
    return all((folder / name).is_file() and checksum(folder / name) == found for name, found in wanted.items())


class _Hashed:
    """A file that is written to, and the checksum of what was."""

    def __init__(self, file: BinaryIO):
        self._file, self._found = file, hashlib.blake2b(digest_size=16)
        self.hexdigest = self._found.hexdigest

    def write(self, numbers: np.ndarray) -> None:
        content = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()
        self._found.update(content)
        self._file.write(content)


@functools.lru_cache(maxsize=1)
def _vocabulary(tokenizer: Path | None, changed: int | None) -> Vocabulary:
    return open_vocabulary(tokenizer)


def _encoded(part: Part, key: str, vocabulary: Vocabulary) -> Iterator[tuple[np.ndarray, int, bool]]:
    """The ids of fragments, the bytes of their text, and whether a document ends with them."""
    found: list[tuple[str, bool]] = []
    size = 0
    for piece in part.pieces:
        for text, last in documents(piece, key):
            found.append((text, last))
            size += len(text)
            if size >= BATCH:
                yield from _encode(found, vocabulary)
                found, size = [], 0
    yield from _encode(found, vocabulary)


def _encode(found: list[tuple[str, bool]], vocabulary: Vocabulary) -> Iterator[tuple[np.ndarray, int, bool]]:
    encoded = vocabulary.encode_all([text for text, _ in found])
    for (text, last), ids in zip(found, encoded, strict=True):
        yield ids, len(text) if text.isascii() else len(text.encode()), last
