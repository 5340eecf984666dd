"""Attention of some queries over one block of keys, for :mod:`ssmzoo.parallel.ring` and ``balanced`` beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels import attention
from ssmkernels.ops.attention.partial import partial_gradients
from ssmzoo.parallel.inputs import Inputs, Results, Sums
from ssmzoo.parallel.layout import Layout, Run, Span, add_rows, joined, take


class Options(NamedTuple):
    """Of attention: tokens seen to the left and the right of a query's own, -1 for no bound, and the logits'."""

    left: int
    right: int
    scale: float | None
    softcap: float

    def sees(self, q: Run, k: Run) -> bool:
        """Whether any of these queries sees any of these keys."""
        same = q.sequence == k.sequence
        return (
            same and (self.right < 0 or k.first < q.end + self.right) and (self.left < 0 or k.end > q.first - self.left)
        )

    def of(self, q: Run, k: Run) -> Run:
        """The keys that any of these queries sees, where it sees any."""
        first = k.first if self.left < 0 else max(k.first, q.first - self.left)
        end = k.end if self.right < 0 else min(k.end, q.end + self.right)
        return Run(k.sequence, first, end - first)

    def asking(self, q: Run, k: Run) -> Run:
        """The queries that see any of these keys, where any does."""
        first = q.first if self.right < 0 else max(q.first, k.first - self.right)
        end = q.end if self.left < 0 else min(q.end, k.end + self.left)
        return Run(q.sequence, first, end - first)

    def visible(self, q: Run, k: Run) -> int:
        """How many pairs of these queries and keys, of one sequence, see each other."""
        found = q.length * k.length if self.right < 0 else _within(q, k, self.right)
        return found - (0 if self.left < 0 else _within(q, k, -self.left - 1))


def _within(q: Run, k: Run, most: int) -> int:
    """How many pairs there are of a query and a key that stands at most so many places after it."""

    def until(count: int) -> int:  # of queries with 0, 1, … of these keys, at most all of them; so many queries
        count = max(count, 0)
        rising = min(count, k.length)
        return rising * (rising - 1) // 2 + (count - rising) * k.length

    first = q.first + most + 1 - k.first
    return until(first + q.length) - until(first)


class Pair(NamedTuple):
    """Rows of queries and of the keys that they meet, and how much later the first query stands than the first key."""

    q: Span
    k: Span
    apart: int

    @property
    def like(self) -> tuple[int, int, int]:
        """What is alike for pairs that one call can compute."""
        return self.q[1] - self.q[0], self.k[1] - self.k[0], self.apart


class Pairs(NamedTuple):
    """What of the keys of one process the queries of another see.

    Attributes:
        rows: of the keys, there.
        pairs: with rows of keys as they stand among these.
    """

    rows: list[Span]
    pairs: list[Pair]

    @classmethod
    def of(cls, layout: Layout, asking: int, giving: int, options: Options) -> Pairs:
        queries, keys = layout.runs[asking], layout.runs[giving]
        rows, pairs, at = [], [], 0
        of_sequence: dict[int, list[tuple[int, Run]]] = {}
        for row, q in zip(layout.rows(asking), queries, strict=False):
            of_sequence.setdefault(q.sequence, []).append((row, q))
        for row, k in zip(layout.rows(giving), keys, strict=False):
            seeing = [(a, q) for a, q in of_sequence.get(k.sequence, []) if options.sees(q, k)]
            if not seeing:
                continue
            seen = [options.of(q, k) for _, q in seeing]
            first, end = min(run.first for run in seen), max(run.end for run in seen)
            rows.append((row + first - k.first, row + end - k.first))
            for (a, q), run in zip(seeing, seen, strict=True):
                here = at + run.first - first
                pairs.append(Pair((a, a + q.length), (here, here + run.length), q.first - run.first))
            at += end - first
        return cls(rows, pairs)

    def groups(self) -> Iterator[list[Pair]]:
        """Pairs that one call can compute; those of runs with themselves can be packed, whatever their lengths."""

        def key(pair: Pair) -> tuple[int, int, int]:
            q, k, apart = pair.like
            return (-1, -1, 0) if q == k and apart == 0 else pair.like

        for _, group in itertools.groupby(sorted(self.pairs, key=key), key):
            yield list(group)


class Blocks:
    """The queries of a call, and what attention over a block of keys needs beside."""

    def __init__(self, inputs: Inputs, options: Options):
        self.q, self.slopes, self.options = inputs.q, inputs.slopes, options
        self.shapes, self.sizes = (inputs.k.shape[1:], inputs.v.shape[1:]), inputs.sizes

    def queries(self, x: Tensor, group: list[Pair]) -> Tensor:
        """The rows of these pairs ``(b n …)``: packed one after another, or one batch a pair."""
        return self._batched([(pair.q, pair) for pair in group], x)

    def keys(self, both: Tensor, group: list[Pair]) -> tuple[Tensor, Tensor]:
        """Likewise keys and values ``(b m h_kv …)``."""
        rows = self._batched([(pair.k, pair) for pair in group], both)
        k, v = rows.split(self.sizes, dim=-1)
        return k.unflatten(-1, self.shapes[0]), v.unflatten(-1, self.shapes[1])

    def call(self, group: list[Pair]) -> dict[str, Any]:
        """Further arguments of attention."""
        options, (n, m, apart) = self.options, group[0].like
        given: dict[str, Any] = {"alibi_slopes": self.slopes, "scale": options.scale, "softcap": options.softcap}
        if self.packed(group):
            borders = list(itertools.accumulate((pair.like[0] for pair in group), initial=0))
            given["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32, device=self.q.device)
            return {**given, "window": (options.left, options.right)}
        left = options.left if 0 <= options.left < apart + n else -1
        right = options.right if 0 <= options.right < m - apart else -1
        given["window"] = (left, right)
        if n != m or apart:
            if max(left, right) < 0 and self.slopes is None:
                return given
            batch, device = len(group), self.q.device
            given["q_positions"] = torch.arange(apart, apart + n, dtype=torch.int32, device=device).expand(batch, n)
            given["k_positions"] = torch.arange(m, dtype=torch.int32, device=device).expand(batch, m)
        return given

    @staticmethod
    def packed(group: list[Pair]) -> bool:
        """Whether the pairs differ in length, and are packed."""
        return len({pair.like for pair in group}) > 1

    def _batched(self, spans: list[tuple[Span, Pair]], x: Tensor) -> Tensor:
        rows = take(x, joined([span for span, _ in spans]))
        return rows[None] if self.packed([pair for _, pair in spans]) else rows.unflatten(0, (len(spans), -1))


def merged(out: Tensor, lse: Tensor, blocks: Blocks, pairs: Pairs, both: Tensor) -> None:
    """Merges attention over these keys ``(m, channels)`` into out ``(l h v)`` and lse ``(h l)``, in place."""
    for group in pairs.groups():
        q, (k, v) = blocks.queries(blocks.q, group), blocks.keys(both, group)
        part, sums = attention(q, k, v, return_lse=True, **blocks.call(group))
        merge_rows(out, lse, [pair.q for pair in group], part.flatten(0, 1), sums.transpose(0, 1).flatten(1))


def merge_rows(out: Tensor, lse: Tensor, rows: list[Span], part: Tensor, sums: Tensor) -> None:
    """Merges the outputs ``(n h v)`` and log-sum-exps ``(h n)`` of these rows over further keys, in place."""
    at = 0
    for a, b in rows:
        here = slice(at, at + b - a)
        new = torch.logaddexp(lse[:, a:b], sums[:, here])
        finite = new.masked_fill(new == -torch.inf, 0)
        before, now = ((x - finite).exp_().T[..., None] for x in (lse[:, a:b], sums[:, here]))
        out[a:b].mul_(before).add_(part[here] * now)
        lse[:, a:b] = new
        at += b - a


def gradients_of(blocks: Blocks, pairs: Pairs, both: Tensor, results: Results, sums: Sums) -> Tensor:
    """Gradients of these keys and values ``(m, channels)``; those of queries and slopes are added in place."""
    found = sums.q.new_zeros(both.shape)
    for group in pairs.groups():
        k, v = blocks.keys(both, group)
        q, out, d_out = (blocks.queries(x, group) for x in (blocks.q, results.out, results.d_out))
        lse, d_lse = (
            None if x is None else blocks.queries(x.T, group).transpose(1, 2).contiguous()
            for x in (results.lse, results.d_lse)
        )
        assert lse is not None
        grads = partial_gradients(q, k, v, out, lse, d_out, d_lse, **blocks.call(group))
        rows = torch.cat([grads[name].flatten(2) for name in ("k", "v")], dim=-1).flatten(0, 1)  # type: ignore[union-attr]
        add_rows(sums.q, [pair.q for pair in group], grads["q"].flatten(0, 1))  # type: ignore[union-attr]
        add_rows(found, [pair.k for pair in group], rows)
        if sums.slopes is not None:
            sums.slopes.add_(grads["alibi_slopes"])  # type: ignore[arg-type]
    return found


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """With one more logit for each head that has no value."""
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out * (lse - total).exp().T[..., None], total


def of_sinks(sinks: Tensor | None, results: Results) -> Tensor | None:
    """The gradient of ``sinks``."""
    if sinks is None:
        return None
    weights = torch.exp(sinks.to(results.lse.dtype)[:, None] - results.lse)
    return -(weights * results.delta.T).sum(1).to(sinks.dtype)
