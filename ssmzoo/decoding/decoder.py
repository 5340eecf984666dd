"""The prepared calls of one model for one state."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ssmkernels import rms_norm
from ssmkernels.native.calls import Calls, NotPreparedError, Renewed
from ssmkernels.native.prepared import Program
from ssmzoo.block import Block, LayerState
from ssmzoo.decoding.ends import Ends
from ssmzoo.decoding.parts import Parts
from ssmzoo.mixer import Mixer
from ssmzoo.mlp import ShiftingChannelMixer
from ssmzoo.norm import LayerNorm, RMSNorm
from ssmzoo.state import State
from ssmzoo.steady import Period
from ssmzoo.value_residual import ValueResidualMixer

KEPT = 32  # programs of a model, each for another shape of states or another thread


class Facts(NamedTuple):
    """What a program depends on beside the layers' parts.

    ``layout`` is what it was made for: the thread that runs it, shapes, strides, dtypes. ``addresses`` are those of the
    states' ``tensors``, which may move. ``kinds`` are the states' classes.
    """

    layout: tuple[object, ...]
    addresses: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    kinds: frozenset[type]

    def same(self, other: Facts) -> bool:
        """Whether a program for the one runs for the other."""
        return self.addresses == other.addresses and self.layout == other.layout


_NOWHERE = Facts((), (), (), frozenset())


class Decoder:
    """The prepared calls, or that there are none.

    To make a program takes about as long as to call the layers, so that the first token goes through it too: the same
    text would otherwise end differently the first time and later, where native kernels round differently. One for
    states of the same shape is there already, and is told where the new ones lie.

    Args:
        parts: the layers and all their parts, as they were.
        facts: what else must not have changed.
        ends: what the program computes after the layers, too; None for the layers alone.
        family: the decoders for the same parts by their layout, of which this will be one.

    Attributes:
        program: the calls, once they are prepared.
        refused: the shape of tokens for which there are none; other shapes may fare better.
    """

    def __init__(self, parts: Parts, facts: Facts, ends: Ends | None, family: Family | None = None):
        self.parts, self.facts, self.ends = parts, facts._replace(tensors=()), ends  # states are not kept alive
        self.family: Family = OrderedDict() if family is None else family
        self.family[facts.layout] = self
        self.thread = threading.get_ident()
        self.program: Program | None = None
        self.refused: torch.Size | None = None
        self.lock = threading.Lock()  # of the memory between the layers

    def turned(self, facts: Facts) -> Decoder:
        """That of the family for other states: the one for their shape, if it can go there or is none; or a new one."""
        found = self.family.pop(facts.layout, None)
        if found is not None:
            found.facts = _NOWHERE  # should this be interrupted
        if found is not None and (found.refused or (found.program is not None and found.program.move(facts.tensors))):
            found.facts = facts._replace(tensors=())
            self.family[facts.layout] = found  # the last one to be forgotten
            return found
        while len(self.family) >= KEPT:
            self.family.popitem(last=False)
        return Decoder(self.parts, facts, self.ends, self.family)

    def trusts(self, period: Period | None, states: Sequence[State], x: Tensor) -> bool:
        """Whether the program may run without a look, as nothing has changed since :meth:`trust`."""
        if period is None or (trusted := period.states.get(self)) is None:
            return False
        known, _ = trusted
        return (
            self.program is not None
            and self.thread == threading.get_ident()  # or its own thread might move it to other states meanwhile
            and x.shape[0] == self.stream.shape[0]
            and x.dtype == self.stream.dtype
            and torch.is_inference_mode_enabled() == self.stream.is_inference()
            and len(states) == len(known)
            and all(map(operator.is_, states, known))
        )

    def trust(self, period: Period, states: Sequence[State], tensors: tuple[Tensor, ...]) -> None:
        """Takes the parts and these states, which hold ``tensors``, to stay as they are, as long as the period lasts.

        The period keeps them alive, and nothing here does, so that they go with it.
        """
        if self.parts not in period.kept:
            period.kept[self.parts] = self.parts.storages()  # once, however often the states change
        period.states[self] = [*states], tensors

    def prepare(self, blocks: Sequence[Block], states: Sequence[State], x: Tensor, tensors: tuple[Tensor, ...]) -> None:
        """Makes the program for x ``(b 1 d_model)``, unless a layer is more than native calls.

        There is none for states that are not the layers' own, either: whoever calls those learns what is wrong.
        """
        if not all(_belongs(*each, len(x)) for each in zip(blocks, states, strict=True)):
            return
        (inside,) = dtypes_of(blocks)  # of what the layers get and give; the stream may be wider
        self.stream = x.new_empty(x.shape[0], x.shape[2])
        self.normed, self.mixed = (torch.empty_like(self.stream, dtype=inside) for _ in range(2))
        calls, values = Calls(), list[Tensor]()  # the first layer's values, for value residuals
        renewed: list[tuple[int, Renewed]] = []  # by the number of the layer
        try:
            if self.ends is not None:
                self.ends.check(len(x), inside)
            done = True
            for i, each in enumerate(zip(blocks, states, strict=True)):
                done = done and self._prepare_block(calls, *each, values)
                renewed += [(i, one) for one in calls.renewed[len(renewed) :]]
            if done and self.ends is not None:
                self.outputs = self.ends.prepare(calls, self.mixed, self.stream)
        except NotPreparedError:
            done = False
        if not done:
            self.refused = x.shape
            return
        program = Program(calls.made, tensors)
        self.renewals = [(i, [program.place_of(*f) for f in each.fields], each) for i, each in renewed]
        if self.ends is not None:
            self._outputs_at = program.result_at(len(calls.made) - 1)
        self.program = program  # last of all, as Ctrl-C may come anywhere

    def _prepare_block(self, calls: Calls, block: Block, state: State, values: list[Tensor]) -> bool:
        """Adds a layer's calls; False where it is more than those."""
        before, shift = mixing(state), state.mlp if isinstance(state, LayerState) else None
        for norm, part in ((block.norm, block.mixer), (block.norm2, block.mlp)):
            if part is None:
                continue
            self._prepare_norm(calls, norm)
            arguments: tuple[Any, ...] = ()
            if isinstance(part, ValueResidualMixer):
                arguments = before, values
            elif isinstance(part, Mixer):
                arguments = (before,)
            elif isinstance(part, ShiftingChannelMixer):
                arguments = (shift,)
            if part.prepare_step(calls, self.normed, *arguments) is None:
                return False
            calls.into(self.mixed)
        return True

    def _prepare_norm(self, calls: Calls, norm: nn.Module | None) -> None:
        """Adds what the part before has made to the stream, if there is one, and normalises it."""
        if isinstance(norm, LayerNorm):
            if calls.made:
                calls.activated(self.mixed, addend=self.stream)
                calls.into(self.stream)
            calls.head_norm(self.stream[:, None], norm.weight, norm.bias, eps=norm.eps)
        else:
            assert isinstance(norm, RMSNorm)
            if not calls.made and self.stream.dtype == self.normed.dtype:
                calls.op(rms_norm, self.stream, norm.weight, eps=norm.eps)
            else:  # what is added is zeros at first
                calls.op(rms_norm, self.mixed, norm.weight, eps=norm.eps, residual=self.stream)
        calls.into(self.normed)

    def run(self, x: Tensor, states: Sequence[State]) -> Tensor | None:
        """x ``(b 1 d_model)`` → the same after the layers, or the head's ``(b 1 outputs)`` if that is in the program.

        None while another thread's token is under way.
        """
        if self.program is None:
            return None
        mine = False
        try:
            mine = self.lock.acquire(blocking=False)
            if not mine:
                return None
            self.stream.copy_(x[:, 0])
            if self.mixed.dtype != self.stream.dtype:
                self.mixed.zero_()
            outputs = None if self.ends is None else torch.empty_like(self.outputs)  # which the caller may keep
            if outputs is not None:
                self._outputs_at.value = outputs.data_ptr()
            for layer, places, renewed in self.renewals:
                for place, value in zip(places, renewed.before(mixing(states[layer])), strict=True):
                    place.value = value
            self.program.run()
            for layer, _, renewed in self.renewals:
                renewed.after(mixing(states[layer]))
            return (self.stream + self.mixed if outputs is None else outputs)[:, None]
        finally:
            if mine:
                self.lock.release()


Family = OrderedDict[tuple[object, ...], Decoder]


def _belongs(block: Block, state: State, rows: int) -> bool:
    """Whether a layer's state is of its kind, and has so many sequences."""
    before, shift = mixing(state), state.mlp if isinstance(state, LayerState) else None
    if (shift is not None) != isinstance(block.mlp, ShiftingChannelMixer):
        return False
    held = [before] if shift is None else [before, shift]
    return before.serves(block.mixer.state_class) and all(each.n_sequences == rows for each in held)


def mixing(state: State) -> State:
    """Of a layer's state what its mixer carries."""
    return state.mixer if isinstance(state, LayerState) else state


def dtypes_of(blocks: Sequence[Block]) -> set[torch.dtype]:
    """Those of the norms' weights, and so of what they give."""
    return {cast(Tensor, norm.weight).dtype for block in blocks for norm in block.norms}
