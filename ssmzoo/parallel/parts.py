"""How mixers, ops and token shifts cross the cuts of a sequence: one call of a model on every process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.crossing import crossing
from ssmkernels.core.packing import last_of_each
from ssmkernels.core.validate import precision
from ssmzoo.mixer import Mixer
from ssmzoo.parallel.channels import to_channels, to_tokens
from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.layout import Layout, Run
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.ops import cross
from ssmzoo.parallel.share import share
from ssmzoo.parallel.steps import CHANNELS, FOLDED, WAITS, WHOLE, Step, Traffic, gathered, handed_on, of_tokens, spread


class Parts:
    """One call of a model whose sequences are cut (:class:`ssmkernels.core.crossing.Crossing`).

    Attributes:
        cut: where.
        line: to the other processes.
        keeps: whether the states after the last token are wanted; every process then gets them.
        names: the mixers' paths in the model.
        steps: how things have crossed so far.
        by_reference: mixers hand their state on or see whole sequences, even where they have a faster way.
        how: the way of attention; None for the best.
    """

    def __init__(
        self, cut: Cut, line: Line, keeps: bool, by_reference: bool, how: str | None, names: Mapping[Mixer, str]
    ):
        self.cut, self.line, self.keeps, self.by_reference, self.how = cut, line, keeps, by_reference, how
        self.layout = Layout.of_cut(cut)
        self.steps: list[Step] = []
        self.layer = ""  # the mixer that a step is in
        self.names = names

    def note(self, what: str, how: str, traffic: Traffic, in_turn: bool = False) -> None:
        """Remembers how something crosses the cuts."""
        self.steps.append(Step(self.layer, what, how, traffic, in_turn))

    @property
    def starts(self) -> Tensor:
        return self.cut.starts

    @property
    def totals(self) -> Tensor:
        return self.cut.totals

    def op(self, name: str, call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        with crossing(None):
            return cross(self, name, call, given) if "cu_seqlens" in given else call(**given)

    def mixer(self, mixer: Mixer, mix: Callable[..., Any], x: Tensor, state: Any, cu_seqlens: Tensor | None) -> Any:
        around, self.layer = self.layer, self.names.get(mixer, self.layer)
        try:
            return self._mixed(mixer, mix, x, state, cu_seqlens)
        finally:
            self.layer = around

    def _mixed(self, mixer: Mixer, mix: Callable[..., Any], x: Tensor, state: Any, cu_seqlens: Tensor | None) -> Any:
        way = mixer.crosses_by(state is not None)
        if self.by_reference and way == "ops":
            way = "state" if mixer.has_state and mixer.causal else "whole"
        if way == "ops" and state is None and mixer.crosses_with_state:
            y, _, *rest = mix(x, mixer.initial_state(self.cut.sequences), cu_seqlens)
            return y, None, *rest
        if way == "ops":
            return mix(x, state, cu_seqlens)
        name = type(mixer).__name__
        return (
            self._hand_on(name, mixer, mix, x, state, cu_seqlens) if way == "state" else self._see_whole(name, mix, x)
        )

    def _hand_on(
        self, name: str, mixer: Mixer, mix: Callable[..., Any], x: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> Any:
        """Each process goes on from the state of the one before it: they work one after another."""
        line, rank, last = self.line, self.cut.rank, self.cut.ranks - 1
        if rank > 0:
            before = line.receive_state(rank - 1, x.device)
        elif state is not None:
            before = state
        else:
            before = mixer.initial_state(self.cut.sequences, self.cut.longest)
        with crossing(None):
            y, after, *rest = mix(x, before, cu_seqlens)
        self.note(name, WAITS, handed_on(before.tensors(), after.tensors(), rank, last + 1, self.keeps), in_turn=True)
        if rank < last:
            line.send_state(rank + 1, after)
        if self.keeps:
            after = line.broadcast_state(last, after if rank == last else None, x.device)
        return y, after if self.keeps else None, *rest

    def _see_whole(self, name: str, mix: Callable[..., Any], x: Tensor) -> Any:
        """Every process computes whole sequences, and keeps its part."""
        cut, whole = self.cut, self._whole(x, name, WHOLE)
        with crossing(None):
            y, after, *rest = mix(whole, None, cut.whole_cu_seqlens)
        return y.index_select(1, cut.own), after, *(value.index_select(1, cut.own) for value in rest)

    def window(self, x: Tensor, before: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        cut = self.cut
        own = last_of_each(x[0], cut.cu_seqlens, width).to(precision(x))
        self.note("tokens", of_tokens(width), gathered(own, cut.ranks))
        parts = self.line.gather(own)  # (ranks s width d)
        first = torch.zeros_like(own) if before is None else before
        tokens = torch.cat([first[None], parts]).transpose(0, 1).flatten(1, 2)  # (s (1 + ranks) width d)
        row = torch.arange(cut.sequences, device=x.device)[:, None]
        entering, final = (tokens[row, cut.newest(rank, width)] for rank in (cut.rank, cut.ranks))
        return entering, final

    def carried(
        self, before: Tensor, left: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        cut = self.cut
        self.note("linear system", FOLDED, gathered(left, cut.ranks))
        parts, states = self.line.gather(left), [before]
        for r in range(cut.ranks if self.keeps else cut.rank):
            counts = torch.tensor(cut.counts[r], device=cut.device)
            states.append(advance(states[-1], counts) + parts[r])
        return states[cut.rank], states[-1]

    @property
    def whole_cu_seqlens(self) -> Tensor:
        return self.cut.whole_cu_seqlens

    def whole(self, x: Tensor) -> Tensor:
        return self._whole(x, "tokens", "every process gets whole sequences")

    def _whole(self, x: Tensor, what: str, how: str) -> Tensor:
        flat = x.reshape(x.shape[1], math.prod(x.shape[2:]))
        padded = F.pad(flat, (0, 0, 0, max(self.cut.lengths) - len(flat)))
        self.note(what, how, gathered(padded, self.cut.ranks))
        return (
            self.line.gather(padded).flatten(0, 1).index_select(0, self.cut.gathered)[None].unflatten(-1, x.shape[2:])
        )

    def total(self, x: Tensor) -> Tensor:
        self.note("sum", "every process adds up what each has", gathered(x, self.cut.ranks))
        return self.line.gather(x).sum(0)

    def share(self, count: int) -> slice:
        return share(count, self.cut.rank, self.cut.ranks)

    def channels(self, tensors: list[Tensor]) -> list[Tensor]:
        flat = [t[0] for t in tensors]
        self.note("channels", CHANNELS, spread(flat, self.cut.rank, self.cut.lengths))
        return [t[None] for t in to_channels(self.line, self.layout, flat)]

    def taps(self, filters: list[Tensor], count: int) -> list[Tensor]:
        shares = [share(count, r, self.cut.ranks) for r in range(self.cut.ranks)]
        runs = tuple((Run(0, s.start, s.stop - s.start),) for s in shares)
        rows = [t.T for t in filters]
        self.note("filters", CHANNELS, spread(rows, self.cut.rank, [s.stop - s.start for s in shares]))
        return [t.T for t in to_channels(self.line, Layout(runs, (count,)), rows)]

    def tokens(self, y: Tensor, channels: int) -> Tensor:
        there, back = spread([y.new_empty(self.cut.lengths[self.cut.rank], channels)], self.cut.rank, self.cut.lengths)
        self.note("channels", "each process gets all channels of its part", Traffic(back, there))
        return to_tokens(self.line, self.layout, y[0], channels)[None]

    def picked(self, x: Tensor, last: bool) -> Tensor:
        cut = self.cut
        if not all(cut.totals.tolist()):
            raise ValueError("Context: `last_only` and pooling need at least one token in every sequence of `inputs`")
        counts = cut.cu_seqlens.diff()
        here = (counts > 0) & ((cut.starts + counts == cut.totals) if last else (cut.starts == 0))
        place = cut.cu_seqlens[1:] - 1 if last else cut.cu_seqlens[:-1]
        rows = x[0].new_zeros(cut.sequences, x.shape[-1])
        return self.total(rows.index_copy(0, here.nonzero()[:, 0], x[0, place[here].long()]))
