"""States that travel between processes, whatever is in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ssmzoo.state import State

Like = list[tuple[tuple[int, ...], torch.dtype]]


@dataclasses.dataclass
class Slot:
    """Where a tensor of a state belongs: its place in the list of them."""

    place: int


@dataclasses.dataclass
class Frame:
    """A state without its tensors, and what these are like."""

    kind: type[State]
    fields: dict[str, Any]
    like: Like


def taken_apart(state: State) -> tuple[Frame, list[Tensor]]:
    """A state's frame and its tensors, in order.

    Raises:
        TypeError: it keeps its tensors in a way of its own, as a paged cache does.
    """
    tensors: list[Tensor] = []
    frame = _frame(state, tensors)
    frame.like = [(tuple(t.shape), t.dtype) for t in tensors]
    if {id(t) for t in tensors} != {id(t) for t in state.tensors()}:
        raise TypeError(
            f"ssmzoo.parallel: `state` must consist of tensors and states to be handed on; got {type(state).__name__}"
        )
    return frame, tensors


def put_together(frame: Frame, tensors: list[Tensor]) -> State:
    """The state of a frame with these tensors."""

    def value(v: Any) -> Any:
        if isinstance(v, Slot):
            return tensors[v.place]
        if isinstance(v, Frame):
            return put_together(v, tensors)
        return [value(each) for each in v] if isinstance(v, list) else v

    return frame.kind(**{name: value(v) for name, v in frame.fields.items()})


def _frame(state: State, tensors: list[Tensor]) -> Frame:
    def value(v: Any) -> Any:
        if isinstance(v, Tensor):
            tensors.append(v)
            return Slot(len(tensors) - 1)
        if isinstance(v, State):
            return _frame(v, tensors)
        return [value(each) for each in v] if isinstance(v, list) else v

    return Frame(type(state), {f.name: value(getattr(state, f.name)) for f in dataclasses.fields(state)}, [])
