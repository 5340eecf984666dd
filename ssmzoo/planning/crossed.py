"""What a mixer exchanges where sequences are cut over processes (:mod:`ssmzoo.parallel`), told by the ops it calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.crossing import crossing
from ssmkernels.core.validate import precision
from ssmzoo.mixer import Mixer
from ssmzoo.parallel.transitions import TRANSITIONS
from ssmzoo.planning.attending import Attending


@dataclasses.dataclass(frozen=True)
class Crossed:
    """Of one call of a mixer on one process's part; bytes.

    Attributes:
        gathered: what each process gives to all others: states and decays, and the last tokens of its part.
        messages: in how many goes.
        attending: its calls of attention.
        way: as :meth:`ssmzoo.Mixer.crosses_by` says.
        exchanged: what is dealt out anew, by channels in the place of tokens.
        length: tokens of a part of one sequence.
    """

    gathered: float = 0.0
    messages: int = 0
    attending: tuple[Attending, ...] = ()
    way: str = "ops"
    exchanged: float = 0.0
    length: int = 0


class _Paper:
    """Carries nothing over cuts, and notes what would be (:class:`ssmkernels.core.crossing.Crossing`)."""

    def __init__(self, cu_seqlens: Tensor, length: int):
        self.whole_cu_seqlens = cu_seqlens
        self.starts = torch.zeros(cu_seqlens.shape[0] - 1, dtype=torch.int64)
        self.totals = torch.full((len(self.starts),), length, device="cpu")
        self.gathered, self.messages, self.exchanged = 0.0, 0, 0.0
        self.attending: list[Attending] = []

    def _gather(self, nbytes: float) -> None:
        self.gathered += nbytes
        self.messages += 1

    def op(self, name: str, call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        if name in TRANSITIONS:
            states, transitions, dtype = TRANSITIONS[name].like(given)
            self._gather(sum(math.prod(shape) for shape in (*states, *transitions)) * dtype.itemsize)
        elif name == "attention":
            self.attending.append(Attending.of(given, len(self.starts)))
        elif name == "causal_conv1d":
            x = given["x"]
            width = given["weight"].shape[-1] - 1
            self._gather(len(self.starts) * width * x.shape[-1] * precision(x).itemsize)
        with crossing(None):
            return call(**given)

    def mixer(self, mixer: Mixer, mix: Callable[..., Any], x: Tensor, state: Any, cu_seqlens: Tensor | None) -> Any:
        if state is None and mixer.crosses_with_state:
            state = mixer.initial_state(len(self.starts))
            y, _, *rest = mix(x, state, cu_seqlens)
            return y, None, *rest
        return mix(x, state, cu_seqlens)

    def window(self, x: Tensor, before: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        tokens = x.new_zeros(len(self.starts), width, x.shape[-1], dtype=precision(x))
        self._gather(tokens.nbytes)
        return tokens, tokens

    def carried(
        self, before: Tensor, left: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        self._gather(left.nbytes)
        return before, left

    def whole(self, x: Tensor) -> Tensor:
        self._gather(x.nbytes)
        return x

    def share(self, count: int) -> slice:
        return slice(0, count)

    def channels(self, tensors: list[Tensor]) -> list[Tensor]:
        self.exchanged += sum(x.nbytes for x in tensors)
        self.messages += 1
        return tensors

    def taps(self, filters: list[Tensor], count: int) -> list[Tensor]:
        return self.channels(filters)

    def tokens(self, y: Tensor, channels: int) -> Tensor:
        return self.channels([y])[0]

    def total(self, x: Tensor) -> Tensor:
        return x

    def picked(self, x: Tensor, last: bool) -> Tensor:
        return x[0, : len(self.starts)]


def crossed(mixer: Mixer, batch: int, length: int) -> Crossed:
    """What a mixer on the meta device exchanges in a forward pass of one part, ``batch`` sequences of this length.

    A mixer that waits for a state hands that on; one that sees whole sequences gathers its inputs. Where a mixer reads
    the borders of sequences, which have no values here, it is twice its state.
    """
    like = mixer.like()
    x = torch.empty(1, batch * length, mixer.d_model, dtype=like.dtype)
    way = mixer.crosses_by(False)
    if way == "whole":
        return Crossed(float(x.nbytes), 1, (), way)
    if way == "state":
        return Crossed(float(mixer.initial_state(batch, length).nbytes), 1, (), way)
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32)
    paper = _Paper(cu_seqlens, length)
    try:
        with torch.no_grad(), crossing(paper):
            mixer(x, cu_seqlens=cu_seqlens)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return Crossed(2.0 * mixer.initial_state(batch, 1).nbytes, 1, (), way)
    return Crossed(paper.gathered, paper.messages, tuple(paper.attending), way, paper.exchanged, length)
