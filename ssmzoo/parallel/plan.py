"""Which way attention crosses the cuts, and what each way sends."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ssmkernels.core.validate import precision
from ssmzoo.parallel.blocks import Options, Pairs
from ssmzoo.parallel.layout import Layout, Span, count
from ssmzoo.parallel.schedule import Schedule, loads, schedule
from ssmzoo.parallel.steps import Traffic

WAYS = ("window", "heads", "ring", "balanced")
UNEVEN = 1.1  # how much more work of the busiest process is too much
KEPT = 32  # plans: a model's kinds of layers, for some lengths
NEAR = 1.1  # up to how many more bytes than the least the way in fewer steps is taken


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
        return _kept(layout, options, (h, h_kv), widths, sizes, how)

    @functools.cached_property
    def how(self) -> str:
        """The forced way; or a narrow window's own, and else the one that :func:`chosen` takes."""
        if self.forced is not None:
            return self.forced
        ranks = range(len(self.parts.runs))
        lengths = [self.parts.rows(r)[-1] for r in ranks]
        others = [sum(count(self._seen[r][g]) for g in ranks if g != r) for r in ranks]
        if self.options.right == 0 and max(others) <= (max(lengths) if self.options.left >= 0 else 0):
            return "window"
        return chosen(self.busiest, self.steps)

    @functools.cached_property
    def busiest(self) -> dict[str, int]:
        """Bytes of the process that sends most, by the ways that there are to choose from where no window is narrow.

        Without a causal mask, and with a window, work is even in a ring as it is.
        """
        ranks, ways = range(len(self.parts.runs)), ["ring"]
        if not any(heads % len(ranks) for heads in self.heads):
            ways.insert(0, "heads")
        if self.options.right == 0 and self.options.left < 0:
            work = loads(self.schedule, len(ranks))
            ways += ["balanced"] * (max(work) * len(ranks) <= UNEVEN * sum(work))
        return {way: max(sum(self.traffic(way, r)) for r in ranks) for way in ways}

    def steps(self, way: str) -> int:
        """How often processes send, forward: tokens that are dealt out anew and outputs that go back among them."""
        if way == "balanced":
            return len(self.schedule)  # whose first one needs nothing; answers of the last
        return 2 if way == "heads" else len(self.parts.runs) - 1 + 2 * (self.layout is not self.parts)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Of balanced attention."""
        return schedule(self.parts, self.options)

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
        for run in self.parts.runs[rank]:
            start = 0 if self.options.left < 0 else max(0, run.first - self.options.left)
            base = self.parts.bases[run.sequence]
            firsts[run.sequence] = (base + start, base + run.end)
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
        if way == "balanced":
            return self._lent[rank]
        layout = self.parts if way == "window" else self.layout
        seen = self._seen if layout is self.parts else self._seen_dealt
        given = sum(count(seen[r][rank]) for r in others) * both
        taken = sum(count(seen[rank][r]) for r in others) * both
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
        ranks = len(self.parts.runs)
        if self.how == "window":
            seen = [count(self._seen[rank][r]) for r in range(ranks) if r != rank]
            n = sum(map(bool, seen))
            return f"window: keys and values of {sum(seen)} tokens from {n} other process{'es' * (n != 1)}"
        why = "as asked for" if self.forced is not None else self._why()
        if self.how == "heads":
            return f"heads: whole sequences of {self.heads[0] // ranks} heads on each process ({why})"
        if self.how == "ring":
            dealt = "" if self.layout is self.parts else ", an early and a late piece of the tokens on each process"
            return f"ring: keys and values go round in {ranks} steps{dealt} ({why})"
        lent = [task for step in self.schedule for task in step if task.helped]
        helps, helped = sum(task.at == rank for task in lent), sum(task.asks == rank for task in lent)
        return (
            f"balanced: tokens stay, {len(self.schedule)} steps; of the blocks of queries and keys this process "
            f"computes {helps} for others, and others {helped} for it ({why})"
        )

    def _why(self) -> str:
        ranks, sent = len(self.parts.runs), self.busiest[self.how]
        others = [f"{way} would send {n} in {self.steps(way)}" for way, n in self.busiest.items() if way != self.how]
        if "heads" not in self.busiest:
            others.append(f"{self.heads[0]} and {self.heads[1]} heads do not divide by {ranks}")
        if "balanced" not in self.busiest and self.options.right == 0 and self.options.left < 0:
            others.append("balanced, the busiest process would have too much to do")
        return f"the busiest process sends {sent} bytes in {self.steps(self.how)} steps; {'; '.join(others)}"

    @functools.cached_property
    def _seen(self) -> list[list[list[Span]]]:
        """The rows of each process that each sees, by who sees and whose they are."""
        return [[pairs.rows for pairs in self._pairs(self.parts, r)] for r in range(len(self.parts.runs))]

    @functools.cached_property
    def _seen_dealt(self) -> list[list[list[Span]]]:
        return [[pairs.rows for pairs in self._pairs(self.layout, r)] for r in range(len(self.parts.runs))]

    @functools.cached_property
    def _lent(self) -> list[Traffic]:
        """Bytes of balanced attention, by process."""
        (size, wide), (query, both, out, _), h = self.sizes, self.widths, self.heads[0]
        sent, returned = ([0] * len(self.parts.runs) for _ in range(2))
        for task in (task for step in self.schedule for task in step):
            if task.source is None:
                continue
            rows = count(task.queries if task.helped else task.keys.rows)
            sent[task.source] += rows * (query if task.helped else both) * size
            sent[task.at] += rows * (out * size + h * wide) * task.helped
            returned[task.source] += rows * ((query + out) * size + 2 * h * wide if task.helped else both * size)
            returned[task.at] += rows * (query if task.helped else both) * wide
        return [Traffic(*each) for each in zip(sent, returned, strict=True)]

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
        return count(before) - kept, count(after) - kept


@functools.lru_cache(maxsize=KEPT)
def _kept(*call: Any) -> Plan:
    """The plan of all calls alike: every layer and step asks, and it looks at all pairs of processes."""
    return Plan(*call)


def chosen(busiest: Mapping[str, float], steps: Callable[[str], int]) -> str:
    """The way of which the busiest process sends least; of those that send hardly more, the one in fewest steps."""
    near = [way for way, sent in busiest.items() if sent <= NEAR * min(busiest.values())]
    return min(near, key=lambda way: (steps(way), busiest[way]))
