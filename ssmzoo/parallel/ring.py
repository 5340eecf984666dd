"""Ring attention (Liu, Zaharia and Abbeel 2023, arXiv 2310.01889): keys and values go round, queries stay.

In step t, process r has the keys and values of process r - t, or those rows of them that its queries see, and merges
what they give into its output by the log-sum-exp. Those of step t + 1 travel meanwhile. The backward pass goes round
once more; gradients of keys and values travel back to where these are from. A process never holds more of other
processes' tokens than the blocks of two steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from torch import Tensor

from ssmzoo.parallel.blocks import Blocks, Options, Pairs, gradients_of, merged, with_sinks
from ssmzoo.parallel.inputs import Gradients, Inputs, Results, Sums
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

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Output ``(l h v)`` and log-sum-exp ``(h l)``, in the precision of sums."""
        blocks = Blocks(inputs, self.options)
        out, lse = inputs.before_any_key()
        for _, pairs, keys in self._round(inputs.both):
            merged(out, lse, blocks, pairs, keys)
        return with_sinks(out, lse, inputs.sinks)

    def backward(self, inputs: Inputs, results: Results) -> Gradients:
        blocks, sums = Blocks(inputs, self.options), Sums.of(inputs)
        back: Callable[[], None] | None = None
        for t, pairs, keys in self._round(inputs.both):
            found = gradients_of(blocks, pairs, keys, results, sums)
            if back is not None:
                back()
            back = self._return(t, found, sums.both)
        if back is not None:
            back()
        return sums.gradients(inputs)

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
