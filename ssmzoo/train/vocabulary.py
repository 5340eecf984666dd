"""Text to token ids and back: as bytes, or through a file of the `tokenizers` library."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Vocabulary(Protocol):
    """What turns text into ids and ids into text."""

    size: int  # the largest id and one
    dtype: np.dtype  # the smallest unsigned one that holds all ids
    mask_id: int | None  # the id of the token that masks others, if there is one

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def encode_bytes(self, data: np.ndarray) -> np.ndarray:
        """The ids of UTF-8 text given as uint8, in ``dtype``."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, in ``dtype``."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as ``<|endoftext|>``; None if there is none."""

    def decoder(self) -> Callable[[int], str]:
        """A function that takes ids one by one and gives the text that each one completes, perhaps empty."""


class Bytes:
    """UTF-8 bytes as ids 0 to 255."""

    size = 256
    dtype: np.dtype = np.dtype(np.uint8)
    mask_id: int | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_bytes(self, data: np.ndarray) -> np.ndarray:
        return data

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def token_id(self, token: str) -> int | None:
        return None

    def decoder(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([token]))


class Tokenizer:
    """A `tokenizers` JSON file, without the special tokens that it would add.

    Raises:
        ImportError: the library is not installed.
        FileNotFoundError, ValueError: no such file, or it is no tokenizer.
    """

    MASKS = ("[MASK]", "<mask>")  # as BERT and RoBERTa call it
    PIECE = 2**18  # bytes encoded at once, cut at line ends
    PIECES = 32  # encoded side by side

    def __init__(self, path: str | Path):
        try:
            import tokenizers
        except ImportError:
            raise ImportError("`tokenizer` needs the tokenizers library: pip install 'ssmzoo[train]'") from None
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer file {path}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{path} is no tokenizer file of the tokenizers library: {error}") from None
        self._new_stream = tokenizers.decoders.DecodeStream
        # The fast one keeps no places in the text.
        self._encode_batch = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        # Added tokens may leave gaps, so the largest id counts and not how many ids there are.
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(ids.values(), default=-1) + 1
        self.dtype = np.dtype(next(d for d in (np.uint8, np.uint16, np.uint32) if self.size <= np.iinfo(d).max + 1))
        self.mask_id: int | None = next((ids[mask] for mask in self.MASKS if mask in ids), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_bytes(self, data: np.ndarray) -> np.ndarray:
        found = [np.empty(0, self.dtype)]
        places = list(_pieces(data, self.PIECE))
        for first in range(0, len(places), self.PIECES):
            found += self.encode_all([bytes(data[a:b]).decode() for a, b in places[first : first + self.PIECES]])
        return np.concatenate(found)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def decoder(self) -> Callable[[int], str]:
        stream = self._new_stream(skip_special_tokens=False)
        return lambda token: stream.step(self._tokenizer, token) or ""


def open_vocabulary(tokenizer: str | Path | None) -> Vocabulary:
    """That of a tokenizer file, or bytes."""
    return Bytes() if tokenizer is None else Tokenizer(tokenizer)


def decode(vocabulary: Vocabulary, ids: Iterable[int]) -> str:
    """The text of ids."""
    step = vocabulary.decoder()
    return "".join(step(token) for token in ids)


def cut(data: np.ndarray, at: int, reach: int = 4096) -> int:
    """Where to cut UTF-8 text from ``at`` on: at a line end if one is in reach, else between characters."""
    if at <= 0 or at >= len(data):
        return min(max(at, 0), len(data))
    ends = np.flatnonzero(data[at - 1 : at - 1 + reach] == ord("\n"))
    if len(ends):
        return at + int(ends[0])
    while at < len(data) and data[at] & 0xC0 == 0x80:  # inside a character
        at += 1
    return at


def _pieces(data: np.ndarray, size: int) -> Iterable[tuple[int, int]]:
    start = 0
    while start < len(data):
        end = cut(data, start + size)
        yield start, end
        start = end
