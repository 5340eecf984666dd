"""Which process holds which tokens, and what has to move from one such layout to another."""

from __future__ import annotations

import dataclasses
import functools
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.parallel.cut import Cut

Span = tuple[int, int]  # rows from the first to before the second


class Run(NamedTuple):
    """Consecutive tokens of one sequence: ``length`` of them from place ``first`` on."""

    sequence: int
    first: int
    length: int

    @property
    def end(self) -> int:
        return self.first + self.length


@dataclasses.dataclass(frozen=True)
class Layout:
    """The runs of each process, in the order of its rows; ``totals`` are the lengths of whole sequences."""

    runs: tuple[tuple[Run, ...], ...]
    totals: tuple[int, ...]

    @classmethod
    def of_cut(cls, cut: Cut) -> Layout:
        """Parts as they are: consecutive."""
        totals = tuple(sum(part[s] for part in cut.counts) for s in range(cut.sequences))
        return cls(tuple(_runs(cut.counts, part) for part in range(cut.ranks)), totals)

    @classmethod
    def folded(cls, parts: Layout) -> Layout:
        """Of 2n pieces alike in length, process r of n holds pieces r and 2n-1-r.

        An early and a late piece together see as many earlier tokens on every process.
        """
        totals, n = parts.totals, len(parts.runs)
        alike = all(len({run.length for run in runs}) == 1 and len(runs) == len(totals) for runs in parts.runs if runs)
        if alike:  # a batch, each of whose sequences is cut alike
            pieces = tuple((count,) * len(totals) for count in _evenly(totals[0] if totals else 0, 2 * n))
        else:
            pieces = Cut.of_packed(0, _evenly(parts.bases[-1], 2 * n), parts.bases, torch.device("cpu")).counts
        return cls(tuple(_runs(pieces, r) + _runs(pieces, 2 * n - 1 - r) for r in range(n)), totals)

    @functools.cached_property
    def bases(self) -> list[int]:
        """Where each whole sequence begins, among them all."""
        return list(accumulate(self.totals, initial=0))

    def spans(self, rank: int) -> list[Span]:
        """Which tokens of all whole sequences, one after another, a process has."""
        found = [(self.bases[s] + first, self.bases[s] + first + count) for s, first, count in self.runs[rank]]
        return joined(found)

    def rows(self, rank: int) -> list[int]:
        """Where each run of a process begins in its rows; and how many rows it has."""
        return list(accumulate((run.length for run in self.runs[rank]), initial=0))


class Moves(NamedTuple):
    """What a process does to get from one layout to another.

    Attributes:
        sends: the rows for each process.
        receives: how many come from each.
        order: the rows of what has come, in the order of the new layout.
    """

    sends: list[list[Span]]
    receives: list[int]
    order: list[Span]


def moves(have: list[list[Span]], want: list[list[Span]], rank: int) -> Moves:
    """From what each process has to what each wants, for one of them; both in numbers of all tokens."""
    sends = [[span for span, _ in _shared(have[rank], wanted)] for wanted in want]
    came = [_shared(had, want[rank]) for had in have]
    receives = [sum(b - a for (a, b), _ in each) for each in came]
    places, at = [], 0
    for each in came:
        for (a, b), to in each:
            places.append((to, (at, at + b - a)))
            at += b - a
    return Moves([joined(each) for each in sends], receives, joined([span for _, span in sorted(places)]))


def take(x: Tensor, spans: list[Span]) -> Tensor:
    """These rows of x, one after another; x itself where they are all of it."""
    if spans == [(0, len(x))]:
        return x
    return torch.cat([x[:0], *(x[a:b] for a, b in spans)]) if len(spans) != 1 else x[spans[0][0] : spans[0][1]]


def count(spans: list[Span]) -> int:
    """How many rows these are."""
    return sum(b - a for a, b in spans)


def add_rows(x: Tensor, spans: list[Span], found: Tensor) -> None:
    """Adds to these rows of x, in place, what was found for them, one after another."""
    at = 0
    for a, b in spans:
        x[a:b] += found[at : at + b - a]
        at += b - a


def joined(spans: list[Span]) -> list[Span]:
    """The same with spans that follow on one another made one."""
    found: list[Span] = []
    for a, b in spans:
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        elif a < b:
            found.append((a, b))
    return found


def _shared(had: list[Span], wanted: list[Span]) -> list[tuple[Span, int]]:
    """What of the wanted tokens is there, in the order wanted: its rows, and its first row among the wanted ones."""
    found = []
    to = 0
    for first, end in wanted:
        at, parts = 0, []
        for a, b in had:
            low, high = max(first, a), min(end, b)
            if low < high:
                parts.append(((at + low - a, at + high - a), to + low - first))
            at += b - a
        found += sorted(parts, key=lambda part: part[1])
        to += end - first
    return found


def _runs(counts: tuple[tuple[int, ...], ...], part: int) -> tuple[Run, ...]:
    firsts = [sum(before[s] for before in counts[:part]) for s in range(len(counts[part]))]
    return tuple(Run(s, first, n) for s, (first, n) in enumerate(zip(firsts, counts[part], strict=True)) if n)


def _evenly(total: int, parts: int) -> list[int]:
    return [total * (p + 1) // parts - total * p // parts for p in range(parts)]
