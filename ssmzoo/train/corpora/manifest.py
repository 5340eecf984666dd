"""What a corpus's folder says of itself: ``manifest.json``, which is written when all shards are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ssmzoo.files import replacing

FILE, TOKENIZER = "manifest.json", "tokenizer.json"
FORMAT = "ssmzoo-corpus-1"
IDS, ENDS = ".ids", ".ends"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Documents one after another, in two files of numbers, lowest byte first, and nothing else.

    Attributes:
        name: of the files: ``<name>.ids`` holds the tokens' ids, ``<name>.ends`` the place after each document, int64.
        source: whose documents they are.
        tokens, documents: how many there are.
        bytes: of the text in UTF-8.
        ids_checksum, ends_checksum: BLAKE2 of the files.
    """

    name: str
    source: str
    tokens: int
    documents: int
    bytes: int
    ids_checksum: str
    ends_checksum: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A corpus.

    Attributes:
        dtype: of the ids: uint8, uint16 or uint32.
        vocab_size: the largest id that the tokenizer has, and one.
        tokenizer: the checksum of ``tokenizer.json`` beside it; None for bytes.
        end: the token after each document; None if there is none.
        made_from: checksums of what it was made from.
        shards: in the order of the sources.
    """

    dtype: str
    vocab_size: int
    tokenizer: str | None
    end: str | None
    made_from: dict[str, str]
    shards: list[Shard]

    @property
    def tokens(self) -> int:
        """Of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Of the text in all shards, in UTF-8."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def sources(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(shard.source for shard in self.shards))

    def checksum(self) -> str:
        """Of all that it says."""
        return digest(dataclasses.asdict(self))


def digest(content: object) -> str:
    """A checksum of plain data."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file, with a checksum of its content in it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**content, "checksum": digest(content)}, indent=1))


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a file of :func:`write_sealed`.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        if content.pop("checksum") == digest(content):
            return content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged: make the corpus again")


def is_corpus(folder: Path) -> bool:
    """Whether a folder holds a corpus that is complete."""
    return (folder / FILE).is_file()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes or replaces a corpus's manifest."""
    write_sealed(folder / FILE, {"format": FORMAT, **dataclasses.asdict(manifest)})


def read_manifest(folder: Path) -> Manifest:
    """A corpus's manifest; its shards have the sizes that it says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or a shard is.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no corpus: there is no {FILE}. `ssmzoo tokenize` makes one")
    content = read_sealed(path)
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} must be of the format {FORMAT}: make the corpus again with this version")
    manifest = Manifest(**{**content, "shards": [Shard(**shard) for shard in content["shards"]]})
    for shard in manifest.shards:
        for name, size in sizes(shard, manifest.dtype).items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                got = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
                raise ValueError(f"{path} must have {size} bytes; got {got}: call `ssmzoo tokenize` again")
    return manifest


def sizes(shard: Shard, dtype: str) -> dict[str, int]:
    """Bytes of a shard's files by their names."""
    return {shard.name + IDS: shard.tokens * np.dtype(dtype).itemsize, shard.name + ENDS: shard.documents * 8}
