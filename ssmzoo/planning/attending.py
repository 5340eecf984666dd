"""What attention over cut sequences sends and holds, for parts of equal length.

:class:`ssmzoo.parallel.plan.Plan` says the same of any parts, row by row; this is its sum, which costs nothing for a
thousand of them. Per part of n tokens and over R processes:

- heads: queries, keys and values are dealt out by heads, and outputs come back: n (R - 1) / R tokens of all of these,
  each way (DeepSpeed-Ulysses, arXiv 2309.14509).
- window: the keys and values that the window reaches beyond the part, and their gradients back.
- ring: keys and values go round as far as anyone sees them, once forward, and backward again with their gradients
  (arXiv 2310.01889). A causal mask without a window has tokens dealt out as an early and a late piece first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssmkernels.core.validate import precision


@dataclasses.dataclass(frozen=True)
class Attending:
    """One call of attention on a part.

    Attributes:
        heads: of queries, and of keys and values.
        query, both, out: bytes of a token's queries, of its keys and values, and of its outputs.
        sums: bytes of a token's log-sum-exps, 0 where nobody wants them.
        wider: bytes of a sum over those of a number.
        left: tokens before itself that a token sees; -1 for all.
        causal: it sees none after itself.
        sequences: in the call, each cut alike. Lengths below are of a part of one of them.
    """

    heads: tuple[int, int]
    query: int
    both: int
    out: int
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
            h * wide if given["return_lse"] else 0,
            wide / size,
            left,
            given["causal"] or right == 0,
            sequences,
        )

    def way(self, ranks: int, length: int) -> str:
        """ "window", "heads" or "ring", as the call would choose with parts of this length."""
        left = self._left(ranks, length)
        if self.causal and 0 <= left <= length:
            return "window"
        if any(heads % ranks for heads in self.heads):
            return "ring"
        busiest = {way: max(map(sum, self._traffic(way, ranks, length))) for way in ("heads", "ring")}
        return min(busiest, key=lambda way: busiest[way])

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
        """Bytes of what has come, which is kept where layers are computed again, so that nothing is sent twice."""
        way = self.way(ranks, length)
        if way == "window":
            return float(self.sequences * (length + self._left(ranks, length)) * self.both)
        dealt = way == "heads" or self._dealt(ranks, length, ranks - 1) > 0
        own = self.out + self.sums if way == "ring" else 0
        return self.sequences * length * (own + dealt * (self.query + self.both + self.out))

    def moving(self, ranks: int, length: int) -> float:
        """Bytes of what travels, beyond what attention on a part by itself holds at its worst moment.

        What is dealt out is sent in the place of what attention has kept and frees, so that it counts once, as it
        comes. In a ring these are keys and values side by side, those of two steps, their gradients' sum, and its
        parts that leave and come.
        """
        way = self.way(ranks, length)
        if way == "window":
            return self.sequences * 2.0 * (length + self._left(ranks, length)) * self.both
        if way == "heads":
            return float(self.sequences * length * (self.query + self.both))
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

    def _dealt(self, ranks: int, length: int, rank: int) -> float:
        """Tokens that leave a process for a ring, as many as come."""
        if not self.causal or self._left(ranks, length) >= 0:
            return 0.0
        stay = {2 * rank, 2 * rank + 1} & {rank, 2 * ranks - 1 - rank}
        return length * (1 - len(stay) / 2)
