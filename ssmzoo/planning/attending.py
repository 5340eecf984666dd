"""What attention over cut sequences sends and holds, for parts of equal length.

:class:`ssmzoo.parallel.plan.Plan` says the same of any parts, row by row; this is its sum, which costs nothing for a
thousand of them. Per part of n tokens and over R processes:

- heads: queries, keys and values are dealt out by heads, and outputs come back: n (R - 1) / R tokens of all of these,
  each way (DeepSpeed-Ulysses, arXiv 2309.14509).
- window: the keys and values that the window reaches beyond the part, and their gradients back.
- ring: keys and values go round as far as anyone sees them, once forward, and backward again with their gradients
  (arXiv 2310.01889). A causal mask without a window has tokens dealt out as an early and a late piece first.
- balanced, for causal masks without a window: keys and values go from each process to the half of the others that come
  after it, and queries and answers between those that are further apart; gradients likewise (arXiv 2310.03294).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssmkernels.core.validate import precision
from ssmzoo.parallel.plan import chosen


@dataclasses.dataclass(frozen=True)
class Attending:
    """One call of attention on a part.

    Attributes:
        heads: of queries, and of keys and values.
        query, both, out: bytes of a token's queries, of its keys and values, and of its outputs.
        lse: bytes of a token's log-sum-exps.
        sums: of those that are asked for, 0 where nobody wants them.
        wider: bytes of a sum over those of a number.
        left: tokens before itself that a token sees; -1 for all.
        causal: it sees none after itself.
        sequences: in the call, each cut alike. Lengths below are of a part of one of them.
    """

    heads: tuple[int, int]
    query: int
    both: int
    out: int
    lse: int
    sums: int
    wider: float
    left: int
    causal: bool
    sequences: int = 1

    @classmethod
    def of(cls, given: Mapping[str, Any], sequences: int = 1) -> Attending:
        """That of an op's arguments."""
        q, k, v = given["q"], given["k"], given["v"]
        left, right = given["window"] or (-1, -1)
        size, wide = q.element_size(), precision(q).itemsize
        h, h_kv = q.shape[2], k.shape[2]
        return cls(
            (h, h_kv),
            h * q.shape[3] * size,
            h_kv * (k.shape[3] + v.shape[3]) * size,
            h * v.shape[3] * size,
            h * wide,
            h * wide if given["return_lse"] else 0,
            wide / size,
            left,
            given["causal"] or right == 0,
            sequences,
        )

    def way(self, ranks: int, length: int) -> str:
        """ "window", "heads", "ring" or "balanced", as the call would choose with parts of this length."""
        left = self._left(ranks, length)
        if self.causal and 0 <= left <= length:
            return "window"
        ways = ["heads"] * (not any(heads % ranks for heads in self.heads)) + ["ring"]
        ways += ["balanced"] * (self.causal and left < 0)
        dealt = 2 * (self._dealt(ranks, length, ranks - 1) > 0)
        steps = {"heads": 2, "ring": ranks - 1 + dealt, "balanced": 1 + ranks // 2}
        busiest = {way: max(map(sum, self._traffic(way, ranks, length))) for way in ways}
        return chosen(busiest, steps.__getitem__)

    def sent(self, ranks: int, length: int) -> float:
        """Bytes in a step: of the process that sends most forward, and of the one that sends most backward."""
        forward, backward = zip(*self._traffic(self.way(ranks, length), ranks, length), strict=True)
        return float(self.sequences * (max(forward) + max(backward)))

    def messages(self, ranks: int, length: int) -> float:
        """In how many goes."""
        way = self.way(ranks, length)
        if way == "window":
            return 2.0
        if way == "heads":
            return 4.0 + 2.0 * (self.sums > 0)
        if way == "balanced":
            return 4.0 * (ranks // 2)
        dealt = self._dealt(ranks, length, ranks - 1) > 0
        return 3.0 * (ranks - 1) + dealt * (4.0 + 2.0 * (self.sums > 0))

    def kept(self, ranks: int, length: int) -> float:
        """Bytes that are kept for the backward pass beyond those of a part by itself.

        Outputs are kept twice: as attention gives them, for its own backward pass, and back in their places.
        """
        if self.way(ranks, length) == "window":
            return float(self.sequences * self._left(ranks, length) * self.both)
        return float(self.sequences * length * self.out)

    def taped(self, ranks: int, length: int) -> float:
        """Bytes that are kept where layers are computed again: what has come, and attention's output and log-sum-exp.

        So nothing is sent, and attention is computed, once.
        """
        way = self.way(ranks, length)
        own = length * (self.out * (self.wider if way in ("ring", "balanced") else 1) + self.lse)
        if way == "window":
            return float(self.sequences * (own + (length + self._left(ranks, length)) * self.both))
        dealt = way == "heads" or (way == "ring" and self._dealt(ranks, length, ranks - 1) > 0)
        return self.sequences * (own + dealt * length * (self.query + self.both + self.out))

    def moving(self, ranks: int, length: int) -> float:
        """Bytes of what travels, beyond what attention on a part by itself holds at its worst moment.

        What is dealt out is sent in the place of what attention has kept and frees, so that it counts once, as it
        comes. In a ring these are keys and values side by side, those of two steps, their gradients' sum, and its
        parts that leave and come. A process that helps another has its queries and the gradients of its outputs in the
        place of keys and values.
        """
        way = self.way(ranks, length)
        if way == "window":
            return self.sequences * 2.0 * (length + self._left(ranks, length)) * self.both
        if way == "heads":
            return float(self.sequences * length * (self.query + self.both))
        if way == "balanced":
            lent, found = max(self.both, self.query + self.out + 2 * self.lse), max(self.both, self.query)
            return self.sequences * length * (self.both * (1 + self.wider) + 2 * lent + 2 * found * self.wider)
        return self.sequences * length * self.both * (3 + 3 * self.wider)

    def _left(self, ranks: int, length: int) -> int:
        return self.left if 0 <= self.left < ranks * length - 1 else -1

    def _traffic(self, way: str, ranks: int, length: int) -> list[tuple[float, float]]:
        """Bytes that each process sends forward and backward; of one for all where they are alike."""
        left, everything = self._left(ranks, length), self.query + self.both + self.out + self.sums
        if way == "window":
            gives, takes = left * self.both, left * self.both
            return [(gives * (r < ranks - 1), takes * (r > 0)) for r in (0, ranks // 2, ranks - 1)]
        if way == "heads":
            return [(length * (ranks - 1) / ranks * everything,) * 2]
        if way == "balanced":
            return [self._balanced(ranks, length, rank) for rank in range(ranks)]
        if left < 0 and self.causal:
            return [self._folded(ranks, length, rank) for rank in range(ranks)]
        found: list[tuple[float, float]] = []
        for rank in range(ranks):
            before, after = (min(left if left >= 0 else of, of) for of in (rank * length, (ranks - 1 - rank) * length))
            given, taken = (after, before) if self.causal else (before + after,) * 2
            found.append((given * self.both, (given + self.wider * taken) * self.both))
        return found

    def _folded(self, ranks: int, length: int, rank: int) -> tuple[float, float]:
        """Of a process whose keys those before it need whole, and those after it by half; for its queries likewise."""
        given = rank * length + (ranks - 1 - rank) * length / 2
        taken = (ranks - 1 - rank) * length + rank * length / 2
        dealt = self._dealt(ranks, length, rank) * (self.query + self.both + self.out + self.sums)
        return given * self.both + dealt, (given + self.wider * taken) * self.both + dealt

    def _balanced(self, ranks: int, length: int, rank: int) -> tuple[float, float]:
        """Blocks of processes up to half the circle apart are computed where their queries are, others at their keys.

        Of those of processes halfway round each has one half of the queries, which are whole sequences if there are
        several, so that these need no keys of the others.
        """
        near, after = (ranks - 1) // 2, ranks - 1 - rank
        half = 0 if ranks % 2 else 1 if rank < ranks // 2 else -1  # whose keys, or whose queries are halved
        met = (self.sequences + 1) // 2 / self.sequences
        given, own = min(after, near) + (half > 0) * met, min(rank, near) + (half < 0) * met
        asked = max(0, rank - ranks // 2) + (half < 0) / 2
        helped = max(0, after - ranks // 2) + (half > 0) / 2
        forward = given * self.both + asked * self.query + helped * (self.out + self.lse)
        back = given * self.both + asked * (self.query + self.out + 2 * self.lse)
        return length * forward, length * (back + self.wider * (own * self.both + helped * self.query))

    def _dealt(self, ranks: int, length: int, rank: int) -> float:
        """Tokens that leave a process for a ring, as many as come."""
        if not self.causal or self._left(ranks, length) >= 0:
            return 0.0
        stay = {2 * rank, 2 * rank + 1} & {rank, 2 * ranks - 1 - rank}
        return length * (1 - len(stay) / 2)
