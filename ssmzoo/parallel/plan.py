"""Which way attention crosses the cuts, and what each way sends."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ssmkernels.core.validate import precision
from ssmzoo.parallel.blocks import Options, Pairs
from ssmzoo.parallel.layout import Layout, Span
from ssmzoo.parallel.steps import Traffic

WAYS = ("window", "heads", "ring")
UNEVEN = 1.1  # from how much more work of the busiest process on tokens are dealt out anew


@dataclasses.dataclass(frozen=True)
class Plan:
    """The ways that a call can go, and which it goes; the same on every process.

    Attributes:
        layout: the tokens of each process; in a ring ``dealt``.
        options: tokens seen, and what else attention is told.
        heads: of queries, and of keys and values.
        widths: numbers a token: of its query, of its key and value, of its output, of its log-sum-exp if wanted.
        sizes: bytes of a number, and of one in the precision of sums.
        forced: the way that is asked for.
    """

    parts: Layout
    options: Options
    heads: tuple[int, int]
    widths: tuple[int, int, int, int]
    sizes: tuple[int, int]
    forced: str | None

    @classmethod
    def of(cls, layout: Layout, how: str | None, given: Mapping[str, Any]) -> Plan:
        """That of a call.

        Raises:
            ValueError: it cannot go the way that is asked for.
        """
        q, k, v = given["q"], given["k"], given["v"]
        ranks, longest = len(layout.runs), max(layout.totals, default=0)
        left, right = given["window"] or (-1, -1)
        left, right = (n if 0 <= n < longest - 1 else -1 for n in (left, 0 if given["causal"] else right))
        right = 0 if given["causal"] else right
        h, h_kv = q.shape[2], k.shape[2]
        if how == "heads" and (h % ranks or h_kv % ranks):
            raise ValueError(
                f"ssmzoo.parallel: `how` 'heads' needs heads that {ranks} processes divide; got {h} of queries "
                f"and {h_kv} of keys"
            )
        if how == "window" and right != 0:
            raise ValueError("ssmzoo.parallel: `how` 'window' needs attention to be causal")
        widths = (h * q.shape[3], h_kv * (k.shape[3] + v.shape[3]), h * v.shape[3], h if given["return_lse"] else 0)
        sizes = (q.element_size(), precision(q).itemsize)
        options = Options(left, right, given["scale"], given["softcap"])
        return cls(layout, options, (h, h_kv), widths, sizes, how)

    @functools.cached_property
    def how(self) -> str:
        """The forced way; or a narrow window's own, and else the one of which the busiest process sends less."""
        if self.forced is not None:
            return self.forced
        ranks = range(len(self.parts.runs))
        lengths = [self.parts.rows(r)[-1] for r in ranks]
        others = [sum(_rows(self._seen[r][g]) for g in ranks if g != r) for r in ranks]
        if self.options.right == 0 and max(others) <= (max(lengths) if self.options.left >= 0 else 0):
            return "window"
        if any(heads % len(ranks) for heads in self.heads):
            return "ring"
        busiest = {way: max(sum(self.traffic(way, r)) for r in ranks) for way in ("heads", "ring")}
        return min(busiest, key=lambda way: busiest[way])

    @functools.cached_property
    def layout(self) -> Layout:
        """Of a ring: the parts, or tokens dealt out anew where all earlier ones are seen and parts are uneven work."""
        if self.options.right != 0 or self.options.left >= 0:
            return self.parts
        folded, ranks = Layout.folded(self.parts), range(len(self.parts.runs))
        as_they_are, dealt = (max(sum(map(self._work, self._pairs(x, r))) for r in ranks) for x in (self.parts, folded))
        return folded if as_they_are > UNEVEN * dealt else self.parts

    def spans(self, rank: int) -> list[Span]:
        """Which tokens the queries of a part see, of all whole sequences; for each sequence one span."""
        firsts = [(base, base) for base in self.parts.bases[:-1]]
        for s, first, count in self.parts.runs[rank]:
            start = 0 if self.options.left < 0 else max(0, first - self.options.left)
            firsts[s] = (self.parts.bases[s] + start, self.parts.bases[s] + first + count)
        return firsts

    def traffic(self, way: str, rank: int) -> Traffic:
        """Bytes that a process sends, forward and backward."""
        ranks, (size, wide) = len(self.parts.runs), self.sizes
        query, both, out, sums = self.widths
        others = [r for r in range(ranks) if r != rank]
        if way == "heads":
            mine = self.parts.rows(rank)[-1] * len(others)
            theirs = sum(self.parts.rows(r)[-1] for r in others)
            asked, answered = (query + both) * size // ranks, (out * size + sums * wide) // ranks
            return Traffic(mine * asked + theirs * answered, mine * answered + theirs * asked)
        layout = self.parts if way == "window" else self.layout
        seen = self._seen if layout is self.parts else self._seen_dealt
        given = sum(_rows(seen[r][rank]) for r in others) * both
        taken = sum(_rows(seen[rank][r]) for r in others) * both
        if way == "window":
            return Traffic(given * size, taken * size)
        leaving, coming = self._dealt(rank)
        asked, answered = (query + both) * size, out * size + sums * wide
        return Traffic(
            leaving * asked + given * size + coming * answered,
            leaving * answered + given * size + taken * wide + coming * asked,
        )

    def told(self, rank: int) -> str:
        """What happens, and why."""
        ranks, sent = len(self.parts.runs), sum(self.traffic(self.how, rank))
        if self.how == "window":
            seen = [_rows(self._seen[rank][r]) for r in range(ranks) if r != rank]
            count = sum(map(bool, seen))
            return f"window: keys and values of {sum(seen)} tokens from {count} other process{'es' * (count != 1)}"
        dealt = "" if self.layout is self.parts else ", an early and a late piece of the tokens on each process"
        other = "ring" if self.how == "heads" else "heads"
        if self.forced is not None:
            why = "as asked for"
        elif any(heads % ranks for heads in self.heads):
            why = f"{self.heads[0]} and {self.heads[1]} heads do not divide by {ranks}"
        else:
            why = f"{other} would send {sum(self.traffic(other, rank))} bytes from here, not {sent}"
        if self.how == "heads":
            return f"heads: whole sequences of {self.heads[0] // ranks} heads on each process ({why})"
        return f"ring: keys and values go round in {ranks} steps{dealt} ({why})"

    @functools.cached_property
    def _seen(self) -> list[list[list[Span]]]:
        """The rows of each process that each sees, by who sees and whose they are."""
        return [[pairs.rows for pairs in self._pairs(self.parts, r)] for r in range(len(self.parts.runs))]

    @functools.cached_property
    def _seen_dealt(self) -> list[list[list[Span]]]:
        return [[pairs.rows for pairs in self._pairs(self.layout, r)] for r in range(len(self.parts.runs))]

    def _pairs(self, layout: Layout, rank: int) -> list[Pairs]:
        return [Pairs.of(layout, rank, r, self.options) for r in range(len(layout.runs))]

    @staticmethod
    def _work(pairs: Pairs) -> int:
        """Products of queries and all earlier keys."""
        found = 0
        for pair in pairs.pairs:
            n, m, apart = pair.like
            found += n * m // (2 if n == m and apart == 0 else 1)
        return found

    def _dealt(self, rank: int) -> tuple[int, int]:
        """Tokens that leave a process for a ring, and those that come."""
        if self.layout is self.parts:
            return 0, 0
        before, after = self.parts.spans(rank), self.layout.spans(rank)
        kept = sum(max(0, min(b, d) - max(a, c)) for a, b in before for c, d in after)
        return _rows(before) - kept, _rows(after) - kept


def _rows(spans: list[Span]) -> int:
    return sum(b - a for a, b in spans)
