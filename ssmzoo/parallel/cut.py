"""Where sequences are cut: how many tokens of each sequence each process holds."""

from __future__ import annotations

import dataclasses
import functools
from itertools import accumulate

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Cut:
    """Sequences cut over processes, each of which holds its parts packed one after another.

    Attributes:
        rank: which part is here.
        counts: tokens of each sequence in each part, ``counts[rank][sequence]``.
        device: where tokens are.
    """

    rank: int
    counts: tuple[tuple[int, ...], ...]
    device: torch.device

    @classmethod
    def of_batch(cls, rank: int, lengths: list[int], sequences: int, device: torch.device) -> Cut:
        """A batch, of whose sequences each part holds so many tokens."""
        return cls(rank, tuple((length,) * sequences for length in lengths), device)

    @classmethod
    def of_packed(cls, rank: int, lengths: list[int], borders: list[int], device: torch.device) -> Cut:
        """Packed sequences with these borders, of which each part holds so many tokens."""
        ends = list(accumulate(lengths))
        parts = [
            tuple(max(0, min(b, end) - max(a, end - length)) for a, b in zip(borders, borders[1:], strict=False))
            for length, end in zip(lengths, ends, strict=True)
        ]
        return cls(rank, tuple(parts), device)

    @property
    def ranks(self) -> int:
        return len(self.counts)

    @property
    def sequences(self) -> int:
        return len(self.counts[0])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each part, of all sequences together."""
        return [sum(part) for part in self.counts]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._before(self.ranks), default=0)

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 ``(s + 1)``, the borders of the parts here."""
        return self._borders(self.counts[self.rank])

    @functools.cached_property
    def starts(self) -> Tensor:
        """int64 ``(s)``: tokens of each sequence before its part here."""
        return torch.tensor(self._before(self.rank), device=self.device)

    @functools.cached_property
    def totals(self) -> Tensor:
        """int64 ``(s)``: tokens of each sequence."""
        return torch.tensor(self._before(self.ranks), device=self.device)

    @functools.cached_property
    def whole_cu_seqlens(self) -> Tensor:
        """int32 ``(s + 1)``, the borders of whole sequences, one after another."""
        return self._borders(self._before(self.ranks))

    @functools.cached_property
    def gathered(self) -> Tensor:
        """int64: where each token of the whole sequences stands in the parts, each padded to the longest of them."""
        width, places = max(self.lengths), []
        ends = [list(accumulate(part, initial=0)) for part in self.counts]
        for s in range(self.sequences):
            for r, part in enumerate(self.counts):
                first = r * width + ends[r][s]
                places.append(torch.arange(first, first + part[s]))
        return torch.cat([torch.arange(0), *places]).to(self.device)

    @functools.cached_property
    def own(self) -> Tensor:
        """int64: where each token here stands in the whole sequences."""
        firsts = [end + before for end, before in zip(self._ends(), self._before(self.rank), strict=True)]
        spans = zip(firsts, self.counts[self.rank], strict=True)
        return torch.cat([torch.arange(0), *(torch.arange(a, a + n) for a, n in spans)]).to(self.device)

    def newest(self, rank: int, width: int) -> Tensor:
        """int64 ``(s, width)``: where the last tokens before a part stand, among those of each part before it.

        These are ``width`` tokens before the first part, then the last ones of each part, as many places each, with
        none in the leading ones of a part that is shorter.
        """
        rows = []
        for s in range(self.sequences):
            places = list(range(width))
            for r, part in enumerate(self.counts[:rank], start=1):
                places += range((r + 1) * width - min(part[s], width), (r + 1) * width)
            rows.append(places[len(places) - width :])
        return torch.tensor(rows, dtype=torch.int64, device=self.device).view(self.sequences, width)

    def _ends(self) -> list[int]:
        """Where each whole sequence begins, among them all."""
        return list(accumulate(self._before(self.ranks), initial=0))[:-1]

    def _before(self, rank: int) -> list[int]:
        """Tokens of each sequence in the parts before a rank."""
        return [sum(part[s] for part in self.counts[:rank]) for s in range(self.sequences)]

    def _borders(self, counts: tuple[int, ...] | list[int]) -> Tensor:
        return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32, device=self.device)
