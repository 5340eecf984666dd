"""What a mixer carries from one call to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="State")
P = TypeVar("P", Tensor, "State")  # what a state consists of


@dataclasses.dataclass
class State:
    """Base of all states: a dataclass of tensors ``(s, ...)``, one row a sequence, and of further states.

    Fields may also be lists of either, or plain values (a number, None), which are carried along. A subclass that
    stores its rows in another way overrides :meth:`clone`, :meth:`select`, :meth:`to` and :meth:`tensors`.

    A call takes over the state that it is given and may write into it: ``clone()`` first to branch.
    """

    def clone(self: S) -> S:
        """A copy that goes its own way: what is written into one of them never shows in the other."""
        return self._map(lambda part: part.clone())

    def select(self: S, indices: Tensor | Sequence[int]) -> S:
        """The given sequences in the given order, as a copy: reorders, repeats (for beams) or drops them."""

        def rows(part: P) -> P:
            if isinstance(part, State):
                return part.select(indices)
            return part.index_select(0, torch.as_tensor(indices, dtype=torch.long, device=part.device))

        return self._map(rows)

    def to(self: S, *args: Any, **kwargs: Any) -> S:
        """Every tensor through ``Tensor.to``; a dtype changes floating-point tensors alone."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(part: P) -> P:
            if isinstance(part, State):
                return part.to(*args, **kwargs)
            return part.to(device, dtype if part.is_floating_point() else None, non_blocking)

        return self._map(move)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def n_sequences(self) -> int:
        """How many sequences it holds."""
        for value in vars(self).values():  # and no further than the first: every call of a mixer asks
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, State):
                return first.n_sequences
            if isinstance(first, Tensor):
                return first.shape[0]
        raise ValueError(f"{type(self).__name__} holds no tensor, and so no sequences")

    def tensors(self) -> list[Tensor]:
        """Every tensor in it, those of states within it included."""
        found: list[Tensor] = []

        def note(part: P) -> P:
            found.extend(part.tensors() if isinstance(part, State) else [part])
            return part

        self._map(note)
        return found

    def _map(self: S, function: Callable[[Any], Any]) -> S:
        """The function's value of each tensor and of each state within it, in a state of the same kind."""
        values = {f.name: _map(getattr(self, f.name), function) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **values)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor | State):
        return function(value)
    if isinstance(value, list):
        return [_map(v, function) for v in value]
    return value
