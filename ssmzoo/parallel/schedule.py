"""Who computes which block of attention, where tokens stay where they are (DistFlashAttn: Li et al. 2023, 2310.03294).

A block is the queries of one process and the keys of another. With a causal mask later parts have more of them. So
either of the two computes a block, or each some of its queries: the process that asks gets the keys, or the one that
gives keys gets the queries and answers with what their attention over these keys is.

Blocks of processes that are t apart, round a circle, make step t: half as many steps as processes. Of blocks whose
mirror images nobody sees, the process that is t places further computes them; halfway round, both do half. With a
causal mask and parts of equal length everybody then computes as much, and one block in each step. Where that is uneven,
shares of blocks move between their two processes until it is even, or cannot be more so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from ssmzoo.parallel.blocks import Options, Pair, Pairs
from ssmzoo.parallel.layout import Layout, Run, Span, joined

EVEN = 1.02  # the work of the busiest process beside the mean, up to which nothing moves
LEAST = 0.02  # of the mean work of a process: a share that is not worth a transfer
SWEEPS = 64


class Task(NamedTuple):
    """Some queries of a process over the keys of one.

    Attributes:
        asks, gives, at: the processes whose queries and keys these are, and the one of these two that computes them.
        queries: their rows, at the process that asks.
        keys: rows of keys, at the process that gives them; and who of both sees whom, by their places among these.
        area: how many pairs of them see each other.
    """

    asks: int
    gives: int
    at: int
    queries: list[Span]
    keys: Pairs
    area: int

    @property
    def source(self) -> int | None:
        """The process of which something travels: its keys, or where another computes for it, its queries."""
        return None if self.asks == self.gives else self.asks if self.helped else self.gives

    @property
    def helped(self) -> bool:
        """Whether another process than the one that asks computes it."""
        return self.at != self.asks


Schedule = tuple[tuple[Task, ...], ...]  # of each step; the first ones are of each process by itself


@functools.lru_cache(maxsize=16)
def schedule(layout: Layout, options: Options) -> Schedule:
    """Each pair of a query and a key that it sees in exactly one task; the same on every process.

    Args:
        layout: consecutive parts, so that a process has one run of a sequence.
        options: which keys a query sees.
    """
    ranks = len(layout.runs)
    blocks = {
        (q, k): block for q in range(ranks) for k in range(ranks) if (block := _Block(layout, q, k, options)).area
    }
    shares = _shares({places: block.area for places, block in blocks.items()}, ranks)
    steps: list[list[Task]] = [[] for _ in range(ranks // 2 + 1)]
    for (asks, gives), block in blocks.items():
        apart = (asks - gives) % ranks
        steps[min(apart, ranks - apart)] += block.tasks(shares[asks, gives])
    return tuple(tuple(tasks) for t, tasks in enumerate(steps) if tasks or t == 0)


def loads(steps: Schedule, ranks: int) -> list[int]:
    """How many pairs of queries and keys each process computes."""
    found = [0] * ranks
    for step in steps:
        for task in step:
            found[task.at] += task.area
    return found


class _Block:
    """Runs of queries and of keys that see each other; of queries only those that see any."""

    def __init__(self, layout: Layout, asks: int, gives: int, options: Options):
        self.asks, self.gives, self.options = asks, gives, options
        self.runs: list[tuple[int, Run, int, Run]] = []
        self.area = 0
        keys = {k.sequence: (row, k) for row, k in zip(layout.rows(gives), layout.runs[gives], strict=False)}
        for row, whole in zip(layout.rows(asks), layout.runs[asks], strict=False):
            at, k = keys.get(whole.sequence, (0, whole))
            if whole.sequence in keys and options.sees(whole, k):
                q = options.asking(whole, k)
                self.runs.append((row + q.first - whole.first, q, at, k))
                self.area += options.visible(q, k)

    def tasks(self, share: float) -> Iterator[Task]:
        """That of the process that asks, with the first queries, as far as they make this share; and of the other."""
        total = sum(q.length for _, q, _, _ in self.runs)
        first = self._first(share, total)
        for at, low, high in ((self.asks, 0, first), (self.gives, first, total)):
            if low < high:
                yield self._task(at, low, high)

    def _first(self, share: float, total: int) -> int:
        """How many queries from the first on it takes for this share of the pairs."""
        low, high = 0, total
        while low < high:
            middle = (low + high) // 2
            area = sum(self.options.visible(q, k) for _, q, _, k in self._between(0, middle))
            low, high = (low, middle) if area >= share * self.area else (middle + 1, high)
        return low

    def _between(self, low: int, high: int) -> Iterator[tuple[int, Run, int, Run]]:
        """The runs of queries from one to before another, counted over all runs."""
        at = 0
        for row, q, key_row, k in self.runs:
            a, b = max(low - at, 0), min(high - at, q.length)
            if a < b:
                yield row + a, Run(q.sequence, q.first + a, b - a), key_row, k
            at += q.length

    def _task(self, at: int, low: int, high: int) -> Task:
        queries, keys, pairs, area = [], [], [], 0
        to = here = 0
        for row, q, key_row, k in self._between(low, high):
            seen = self.options.of(q, k)
            queries.append((row, row + q.length))
            keys.append((key_row + seen.first - k.first, key_row + seen.end - k.first))
            pairs.append(Pair((to, to + q.length), (here, here + seen.length), q.first - seen.first))
            to, here, area = to + q.length, here + seen.length, area + self.options.visible(q, k)
        return Task(self.asks, self.gives, at, joined(queries), Pairs(joined(keys), pairs), area)


def _shares(areas: dict[tuple[int, int], int], ranks: int) -> dict[tuple[int, int], float]:
    """What the process that asks computes of each block.

    Each move makes two processes alike, and by that the sum of the squares of all work less. This is convex, and its
    least is also where the busiest process has least to do.
    """
    found = {(q, k): _at_first(q, k, ranks, (k, q) in areas) for q, k in areas}
    load, mean = [0.0] * ranks, sum(areas.values()) / ranks
    for (q, k), area in areas.items():
        load[q] += found[q, k] * area
        load[k] += (1 - found[q, k]) * area
    for _ in range(SWEEPS):
        if max(load) <= EVEN * mean:
            break
        for (q, k), area in areas.items():
            if q != k:
                share = min(1.0, max(0.0, found[q, k] + (load[k] - load[q]) / (2 * area)))
                load[q] += (share - found[q, k]) * area
                load[k] -= (share - found[q, k]) * area
                found[q, k] = share
    return {places: _worthwhile(share, LEAST * mean / areas[places]) for places, share in found.items()}


def _at_first(q: int, k: int, ranks: int, mirrored: bool) -> float:
    twice = 2 * ((q - k) % ranks)
    return 1.0 if q == k or mirrored or twice < ranks else 0.5 if twice == ranks else 0.0


def _worthwhile(share: float, least: float) -> float:
    return 0.0 if share < least else 1.0 if share > 1 - least else share
