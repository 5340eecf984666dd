"""Batches out of a corpus: windows of tokens, packed with the documents' borders, so that no state crosses one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.names import unknown
from ssmzoo.train.corpora.manifest import ENDS, IDS, Manifest, Shard, digest, read_manifest
from ssmzoo.train.corpora.order import Order
from ssmzoo.train.data import Data, Tokens
from ssmzoo.train.stored import DataChanged, Stored

NOTHING = -100  # in place of a token that is not to be predicted, as PyTorch's cross-entropy has it


class Packed(NamedTuple):
    """Windows one after another, and the token after each of theirs."""

    inputs: Tensor  # (1, b·l) ids
    targets: Tensor  # (b·l) ids; NOTHING where the next token belongs to another document
    cu_seqlens: Tensor  # (s + 1) int32, the borders of windows and of documents in them

    def to(self, device: torch.device) -> Packed:
        """On a device."""
        return Packed(*(t.to(device) for t in self))


def packed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats a token of logits (m c), over those to be predicted; 0 where there is none."""
    total = F.cross_entropy(logits, targets, ignore_index=NOTHING, reduction="sum")
    return total / (targets != NOTHING).sum().clamp(min=1)


class Span(NamedTuple):
    """Tokens of a shard."""

    shard: Shard
    start: int
    stop: int


class PackedTokens:
    """Parts of shards, cut into windows.

    Args:
        folder: of the corpus.
        dtype: of the ids.
        spans: of shards, source by source.
        mixture: weights of the sources; None for all windows in one order.
        name: tells apart this part of the corpus.
    """

    def __init__(self, folder: Path, dtype: str, spans: Sequence[Span], mixture: Mapping[str, float] | None, name: str):
        self._folder, self._spans, self._name = folder, list(spans), name
        stored = np.dtype(dtype).newbyteorder("<")
        self._ids = [
            Stored(folder / (s.shard.name + IDS), stored, kept_open=False).part(slice(s.start, s.stop)) for s in spans
        ]
        self._tokens = Tokens(self._ids)
        self._sources = list(dict.fromkeys(span.shard.source for span in spans))
        self._weights = None if mixture is None else [float(mixture.get(name, 0)) for name in self._sources]
        self._ends = functools.lru_cache(maxsize=128)(self._read_ends)
        self._lasts = functools.cache(self._count)
        self._order = functools.cache(self._make_order)
        self.window, self.width = self._tokens.window, self._tokens.width

    def __len__(self) -> int:
        return len(self._tokens)

    def fingerprint(self) -> str:
        """A number that another corpus will hardly share."""
        return f"{len(self)}-{self._name}"

    def places(self, length: int) -> int:
        """How many windows there are."""
        return int(self._lasts(length)[-1])

    def spread(self, most: int, length: int) -> np.ndarray:
        """Up to ``most`` windows that lie evenly apart."""
        count = self.places(length)
        return np.linspace(0, count - 1, min(most, count)).astype(np.int64)

    def following(self, first: int, size: int, length: int, seed: int) -> Packed:
        """The ``size`` windows from the ``first`` on, in the order of a seed."""
        order = self._order(length, seed)
        return self.take(np.array([order[i] for i in range(first, first + size)]), length)

    def take(self, places: np.ndarray, length: int, draw: np.random.Generator | None = None) -> Packed:
        """The windows of some numbers; ``draw`` is not needed."""
        inputs = np.empty((len(places), length), np.int64)
        targets = np.empty((len(places), length), np.int64)
        borders = []
        lasts = self._lasts(length)
        for row, place in enumerate(places):
            i = int(np.searchsorted(lasts, place, side="right"))
            start = (int(place) - int(lasts[i - 1] if i else 0)) * length
            ids = self._ids[i][start : start + length + 1]
            inputs[row], targets[row] = ids[:-1], ids[1:]
            start += self._spans[i].start
            ends = self._ends(i)
            inside = ends[np.searchsorted(ends, start, side="right") : np.searchsorted(ends, start + length, "right")]
            targets[row, inside - start - 1] = NOTHING
            borders += [row * length, *(row * length + inside[inside < start + length] - start).tolist()]
        cu_seqlens = torch.tensor([*borders, inputs.size], dtype=torch.int32)
        return Packed(torch.from_numpy(inputs.reshape(1, -1)), torch.from_numpy(targets.reshape(-1)), cu_seqlens)

    def _count(self, length: int) -> np.ndarray:
        """How many windows there are up to the end of each span; each reads one token more than it has."""
        return np.cumsum([max(0, span.stop - span.start - 1) // length for span in self._spans], dtype=np.int64)

    def _make_order(self, length: int, seed: int) -> Order:
        counts = np.diff(self._lasts(length), prepend=0)
        windows = [
            int(sum(n for n, span in zip(counts, self._spans, strict=True) if span.shard.source == source))
            for source in self._sources
        ]
        for source, count, weight in zip(self._sources, windows, self._weights or windows, strict=True):
            if weight and not count:
                raise ValueError(
                    f"training setting `mixture` must name sources with a sequence of {length + 1} tokens; {source!r} "
                    "has none: leave it out, or add --set length=..."
                )
        return Order(windows, self._weights, seed)

    def _read_ends(self, i: int) -> np.ndarray:
        """Where the documents of a span's shard end."""
        shard = self._spans[i].shard
        path = self._folder / (shard.name + ENDS)
        ends = Stored(path, np.dtype("<i8"), kept_open=False)[:]
        if len(ends) != shard.documents:
            raise DataChanged(f"the data file {path} was cut while it was in use: put it back, and resume")
        return ends


def load_corpus(folder: Path, held_out: float, length: int, mixture: Mapping[str, float] | None) -> Data:
    """A corpus to train on.

    Args:
        folder: of ``ssmzoo tokenize``.
        held_out: fraction that is held out: whole documents at the end of each shard, where it has several.
        length: tokens of a window.
        mixture: weights of the sources by their names; None for each window once before any comes again.

    Raises:
        FileNotFoundError, ValueError: no corpus, a damaged one, one that is too short, or a mixture that does not fit.
    """
    manifest = read_manifest(folder)
    _check_mixture(manifest, mixture)
    train, validation = [], []
    for shard in manifest.shards:
        place = _cut(folder, shard, held_out)
        train.append(Span(shard, 0, place))
        validation.append(Span(shard, place, shard.tokens))
    name = digest([manifest.checksum(), held_out])
    parts = (
        PackedTokens(folder, manifest.dtype, train, mixture, name),
        PackedTokens(folder, manifest.dtype, validation, None, name),
    )
    for what, part in zip(("training", "validation"), parts, strict=True):
        if part.places(length) == 0:
            raise ValueError(
                f"the {what} data of the corpus {folder} has no shard with a sequence of {length + 1} tokens: give "
                "more data, or shorter sequences with --set length=..."
            )
    parts[0].following(0, 1, length, 0)  # a mixture without windows is told here
    return Data(parts[0], parts[1], manifest.tokens / manifest.bytes)


def _cut(folder: Path, shard: Shard, held_out: float) -> int:
    """The place in a shard from which on it is held out."""
    wanted = round(shard.tokens * (1 - held_out))
    ends = Stored(folder / (shard.name + ENDS), np.dtype("<i8"), kept_open=False)[:]
    i = int(np.searchsorted(ends, wanted, side="right"))
    return int(ends[i - 1]) if i and len(ends) > 1 else wanted


def _check_mixture(manifest: Manifest, mixture: Mapping[str, float] | None) -> None:
    for name in mixture or ():
        if name not in manifest.sources:
            raise ValueError(unknown("source in training setting `mixture`", name, manifest.sources))
