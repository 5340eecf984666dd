"""Ring attention (Liu, Zaharia and Abbeel 2023, arXiv 2310.01889): keys and values go round, queries stay.

In step t, process r has the keys and values of process r - t, or those rows of them that its queries see, and merges
what they give into its output by the log-sum-exp. Those of step t + 1 travel meanwhile. The backward pass goes round
once more; gradients of keys and values travel back to where these are from. A process never holds more of other
processes' tokens than the blocks of two steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.parallel.blocks import Blocks, Options, Pairs, gradients_of, merged, of_sinks, with_sinks
from ssmzoo.parallel.layout import Layout, Span, take
from ssmzoo.parallel.line import Line


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

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q ``(l h k)``, k ``(l h_kv k)`` and v ``(l h_kv v)`` of this process → out ``(l h v)`` and lse ``(h l)``."""
        out, lse, self.line.token = _Attend.apply(q, k, v, slopes, sinks, self.line.token, self)
        return out, lse

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        blocks = Blocks(q, k.shape[1:], v.shape[1:], slopes, self.options)
        out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=precision(q))
        lse = out.new_full((q.shape[1], len(q)), -torch.inf)
        for _, pairs, keys in self._round(_side_by_side(k, v)):
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        blocks = Blocks(q, k.shape[1:], v.shape[1:], slopes, self.options)
        wide = precision(q)
        dq, own = torch.zeros_like(q, dtype=wide), q.new_zeros(len(k), blocks.width, dtype=wide)
        d_slopes = None if slopes is None else torch.zeros_like(slopes, dtype=wide)
        back: Callable[[], None] | None = None
        for t, pairs, keys in self._round(_side_by_side(k, v)):
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
        came = both.new_empty(_count(self.steps[t].rows), both.shape[1])
        sent = take(both, self.sends[t]).contiguous()
        wait = self._transfer(
            sent, (self.line.rank + t) % self.line.ranks, came, (self.line.rank - t) % self.line.ranks
        )

        def arrived() -> Tensor:
            wait()
            return came

        return arrived

    def _return(self, t: int, found: Tensor, own: Tensor) -> Callable[[], None]:
        """Starts sending gradients of keys and values to where these are from; what comes back is added to ``own``."""
        rank, ranks = self.line.rank, self.line.ranks
        rows = self.sends[t]
        if t == 0:
            _add(own, rows, found)
            return lambda: None
        came = own.new_empty(_count(rows), own.shape[1])
        wait = self._transfer(found, (rank - t) % ranks, came, (rank + t) % ranks)

        def add() -> None:
            wait()
            _add(own, rows, came)

        return add

    def _transfer(self, sent: Tensor, to: int, came: Tensor, source: int) -> Callable[[], None]:
        """Starts to send and to receive; neither where there is nothing, which the other side knows as well."""
        group, calls = self.line.group, []
        if sent.numel():
            calls.append(dist.P2POp(dist.isend, sent, self.line.peer(to), group))
        if came.numel():
            calls.append(dist.P2POp(dist.irecv, came, self.line.peer(source), group))
        works = dist.batch_isend_irecv(calls) if calls else []

        def wait() -> None:
            for work in works:
                work.wait()
            calls.clear()  # which keep what is sent alive until here

        return wait


def _side_by_side(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([k.flatten(1), v.flatten(1)], dim=1)


def _count(rows: list[Span]) -> int:
    return sum(b - a for a, b in rows)


def _add(own: Tensor, rows: list[Span], found: Tensor) -> None:
    at = 0
    for a, b in rows:
        own[a:b] += found[at : at + b - a]
        at += b - a


class _Attend(torch.autograd.Function):
    """Output and log-sum-exp are kept where the call may be computed again, so that nothing goes round twice."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Any, sinks: Any, token: Tensor, ring: Ring
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = ring.line.once(lambda: ring.forward(q, k, v, slopes, sinks))
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, slopes, sinks, out, lse)
        return out.to(q.dtype, copy=True), lse.clone(), token.clone()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, token: Tensor | None) -> tuple[Any, ...]:
        q, k, v, slopes, sinks, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out, dtype=q.dtype) if d_out is None else d_out.contiguous()
        dq, dk, dv, d_slopes = ctx.ring.backward(q, k, v, slopes, out, lse, d_out, d_lse)
        d_slopes = None if slopes is None else d_slopes.to(slopes.dtype)
        return dq, dk, dv, d_slopes, of_sinks(sinks, out, lse, d_out, d_lse), token, None
