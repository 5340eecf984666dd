"""Ring attention (Liu, Zaharia and Abbeel 2023, arXiv 2310.01889): keys and values go round, queries stay.

In step t, process r has the keys and values of process r - t, or those rows of them that its queries see, and merges
what they give into its output by the log-sum-exp. Those of step t + 1 travel meanwhile. The backward pass goes round
once more; gradients of keys and values travel back to where these are from. A process never holds more of other
processes' tokens than the blocks of two steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.parallel.blocks import Blocks, Options, Pairs, gradients_of, merged, side_by_side, with_sinks
from ssmzoo.parallel.kept import Gradients
from ssmzoo.parallel.layout import Layout, add_rows, count, take
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.transfers import transfer


@dataclasses.dataclass
class Ring:
    """One call: who needs what of whom.

    Args:
        layout: which tokens each process has.
        line: to the other processes.
        options: of attention.
    """

    layout: Layout
    line: Line
    options: Options

    def __post_init__(self) -> None:
        rank, ranks = self.line.rank, self.line.ranks
        self.steps = [self.pairs(rank, (rank - t) % ranks) for t in range(ranks)]
        self.sends = [self.pairs((rank + t) % ranks, rank).rows for t in range(ranks)]

    def pairs(self, asking: int, giving: int) -> Pairs:
        """The queries of one process and the keys of another, as far as they see each other."""
        return Pairs.of(self.layout, asking, giving, self.options)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q ``(l h k)``, k ``(l h_kv k)`` and v ``(l h_kv v)`` of this process → out ``(l h v)`` and lse ``(h l)``."""
        blocks = Blocks(q, k.shape[1:], v.shape[1:], slopes, self.options)
        out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=precision(q))
        lse = out.new_full((q.shape[1], len(q)), -torch.inf)
        for _, pairs, keys in self._round(side_by_side(k, v)):
            merged(out, lse, blocks, pairs, keys)
        return with_sinks(out, lse, sinks)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        out: Tensor,
        lse: Tensor,
        d_out: Tensor,
        d_lse: Tensor | None,
    ) -> Gradients:
        blocks = Blocks(q, k.shape[1:], v.shape[1:], slopes, self.options)
        wide = precision(q)
        dq, own = torch.zeros_like(q, dtype=wide), q.new_zeros(len(k), blocks.width, dtype=wide)
        d_slopes = None if slopes is None else torch.zeros_like(slopes, dtype=wide)
        back: Callable[[], None] | None = None
        for t, pairs, keys in self._round(side_by_side(k, v)):
            found = gradients_of(blocks, pairs, keys, out, lse, d_out, d_lse, dq, d_slopes)
            if back is not None:
                back()
            back = self._return(t, found, own)
        if back is not None:
            back()
        dk, dv = own.split(blocks.sizes, dim=1)
        return dq.to(q.dtype), dk.reshape(k.shape).to(k.dtype), dv.reshape(v.shape).to(v.dtype), d_slopes

    def _round(self, both: Tensor) -> Iterator[tuple[int, Pairs, Tensor]]:
        """Each step with anything to do: its keys and values ``(rows, channels)``, while those of the next travel."""
        arriving = self._ask(1, both)
        yield 0, self.steps[0], take(both, self.steps[0].rows)
        for t in range(1, self.line.ranks):
            keys = arriving()
            arriving = self._ask(t + 1, both)
            if self.steps[t].rows or self.sends[t]:
                yield t, self.steps[t], keys

    def _ask(self, t: int, both: Tensor) -> Callable[[], Tensor]:
        """Starts the transfers of a step."""
        if t >= self.line.ranks:
            return lambda: both[:0]
        came = both.new_empty(count(self.steps[t].rows), both.shape[1])
        sent = take(both, self.sends[t]).contiguous()
        rank, ranks = self.line.rank, self.line.ranks
        wait = transfer(self.line, [(sent, (rank + t) % ranks)], [(came, (rank - t) % ranks)])

        def arrived() -> Tensor:
            wait()
            return came

        return arrived

    def _return(self, t: int, found: Tensor, own: Tensor) -> Callable[[], None]:
        """Starts sending gradients of keys and values to where these are from; what comes back is added to ``own``."""
        rank, ranks = self.line.rank, self.line.ranks
        rows = self.sends[t]
        if t == 0:
            add_rows(own, rows, found)
            return lambda: None
        came = own.new_empty(count(rows), own.shape[1])
        wait = transfer(self.line, [(found, (rank - t) % ranks)], [(came, (rank + t) % ranks)])

        def add() -> None:
            wait()
            add_rows(own, rows, came)

        return add
