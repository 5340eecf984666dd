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
from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.ops import cross
from ssmzoo.parallel.steps import FOLDED, WAITS, WHOLE, Step, of_tokens


class Parts:
    """One call of a model whose sequences are cut (:class:`ssmkernels.core.crossing.Crossing`).

    Attributes:
        cut: where.
        line: to the other processes.
        keeps: whether the states after the last token are wanted; every process then gets them.
        names: the mixers' paths in the model.
        steps: how things have crossed so far.
        by_reference: mixers hand their state on or see whole sequences, even where they have a faster way.
    """

    def __init__(self, cut: Cut, line: Line, keeps: bool, by_reference: bool, names: Mapping[Mixer, str]):
        self.cut, self.line, self.keeps, self.by_reference = cut, line, keeps, by_reference
        self.steps: list[Step] = []
        self.layer = ""  # the mixer that a step is in
        self.names = names

    def note(self, what: str, how: str, in_turn: bool = False) -> None:
        """Remembers how something crosses the cuts."""
        self.steps.append(Step(self.layer, what, how, in_turn))

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
        self.note(type(mixer).__name__, WAITS if way == "state" else WHOLE, way == "state")
        return self._hand_on(mixer, mix, x, state, cu_seqlens) if way == "state" else self._see_whole(mix, x)

    def _hand_on(self, mixer: Mixer, mix: Callable[..., Any], x: Tensor, state: Any, cu_seqlens: Tensor | None) -> Any:
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
        if rank < last:
            line.send_state(rank + 1, after)
        if self.keeps:
            after = line.broadcast_state(last, after if rank == last else None, x.device)
        return y, after if self.keeps else None, *rest

    def _see_whole(self, mix: Callable[..., Any], x: Tensor) -> Any:
        """Every process computes whole sequences, and keeps its part."""
        cut = self.cut
        with crossing(None):
            y, after, *rest = mix(self.whole(x), None, cut.whole_cu_seqlens)
        return y.index_select(1, cut.own), after, *(value.index_select(1, cut.own) for value in rest)

    def window(self, x: Tensor, before: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        cut = self.cut
        self.note("tokens", of_tokens(width))
        own = last_of_each(x[0], cut.cu_seqlens, width).to(precision(x))
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
        self.note("linear system", FOLDED)
        parts, states = self.line.gather(left), [before]
        for r in range(cut.ranks if self.keeps else cut.rank):
            counts = torch.tensor(cut.counts[r], device=cut.device)
            states.append(advance(states[-1], counts) + parts[r])
        return states[cut.rank], states[-1]

    @property
    def whole_cu_seqlens(self) -> Tensor:
        return self.cut.whole_cu_seqlens

    def whole(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.shape[1], math.prod(x.shape[2:]))
        parts = self.line.gather(F.pad(flat, (0, 0, 0, max(self.cut.lengths) - len(flat))))
        return parts.flatten(0, 1).index_select(0, self.cut.gathered)[None].unflatten(-1, x.shape[2:])

    def total(self, x: Tensor) -> Tensor:
        return self.line.gather(x).sum(0)

    def picked(self, x: Tensor, last: bool) -> Tensor:
        cut = self.cut
        if not all(cut.totals.tolist()):
            raise ValueError("Context: `last_only` and pooling need at least one token in every sequence of `inputs`")
        counts = cut.cu_seqlens.diff()
        here = (counts > 0) & ((cut.starts + counts == cut.totals) if last else (cut.starts == 0))
        place = cut.cu_seqlens[1:] - 1 if last else cut.cu_seqlens[:-1]
        rows = x[0].new_zeros(cut.sequences, x.shape[-1])
        return self.total(rows.index_copy(0, here.nonzero()[:, 0], x[0, place[here].long()]))
