"""The order of a corpus's windows: shuffled, and mixed from several sources, with nothing to store.

Which window is the i-th of a run is computed from i, so a run can go on anywhere, and any number of processes can share
the windows of a step.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from fractions import Fraction

WHOLE = 2**32  # the sum of all shares
ROUNDS = 6  # of the Feistel network


def permuted(i: int, n: int, key: int) -> int:
    """Where a permutation of 0 to n − 1, another one for each key, takes i.

    A Feistel network permutes the numbers of as many bits; those from n on are permuted again until one is below n
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    keys = [mixed(key + r) for r in range(ROUNDS)]
    while True:
        left, right = i >> bits, i & mask
        for k in keys:
            left, right = right, left ^ (mixed(right ^ k) & mask)
        i = left << bits | right
        if i < n:
            return i


def mixed(x: int) -> int:
    """A number of 64 bits, each of which depends on every bit of x: the step of SplitMix64 (Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ x >> 31


class Order:
    """Which window comes i-th.

    Every source goes through its windows in an order of its own, and again in another one once they are used up. At any
    moment each source has given its share of the windows so far, to within one of a window.

    Args:
        windows: how many there are of each source; they are numbered through, source by source.
        weights: of the sources; 0 leaves one out. None for all windows in one order.
        seed: of the order.
    """

    def __init__(self, windows: Sequence[int], weights: Sequence[float] | None, seed: int):
        self._windows = [sum(windows)] if weights is None else list(windows)
        self._shares = _shares([1.0] if weights is None else weights)
        self._keys = [mixed(mixed(seed) + s) for s in range(len(self._windows))]
        self._phases = [key % WHOLE for key in self._keys]

    def __getitem__(self, i: int) -> int:
        """The number of the i-th window."""
        source, before = self._source(i)
        n = self._windows[source]
        epoch, place = divmod(before, n)
        return sum(self._windows[:source]) + permuted(place, n, mixed(self._keys[source] ^ epoch))

    def _given(self, source: int, turn: int) -> int:
        """How many windows of a source there have been before a turn; it grows by its share with each."""
        return (self._shares[source] * turn + self._phases[source]) // WHOLE

    def _source(self, i: int) -> tuple[int, int]:
        """The source of the i-th window, and how many of it there have been before.

        In a turn the sources give one window in all on average, and one each at most.
        """
        count = len(self._shares)
        turns = range(max(0, i - count), i + count + 1)
        turn = turns[bisect.bisect_right(turns, i, key=self._total) - 1]
        left = i - self._total(turn)
        gives = [s for s in range(count) if self._given(s, turn + 1) > self._given(s, turn)]
        return gives[left], self._given(gives[left], turn)

    def _total(self, turn: int) -> int:
        return sum(self._given(s, turn) for s in range(len(self._shares)))


def _shares(weights: Sequence[float]) -> list[int]:
    """Weights as integers with the sum WHOLE; what is above 0 stays above 0."""
    exact = [Fraction(weight) for weight in weights]
    found = [max(1, round(weight / sum(exact) * WHOLE)) if weight else 0 for weight in exact]
    found[found.index(max(found))] += WHOLE - sum(found)
    return found
