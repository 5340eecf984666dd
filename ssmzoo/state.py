"""What a mixer carries from one call to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="State")


@dataclasses.dataclass
class State:
    """Base of all states: a dataclass of tensors ``(s, ...)``, one row a sequence, and of further states.

    Fields may also be lists of either, or plain values (a number, None), which are carried along. A subclass that
    stores its rows in another way overrides :meth:`select`.

    A call takes over the state that it is given and may write into it: ``clone()`` first to branch.
    """

    def clone(self: S) -> S:
        """A copy that shares no memory."""
        return self._map(lambda t: t.clone())

    def select(self: S, indices: Tensor | Sequence[int]) -> S:
        """The given sequences in the given order: reorders, repeats (for beams) or drops them. Shares no memory."""

        def rows(t: Tensor) -> Tensor:
            return t.index_select(0, torch.as_tensor(indices, dtype=torch.long, device=t.device))

        return self._map(rows)

    def to(self: S, *args: Any, **kwargs: Any) -> S:
        """Every tensor through ``Tensor.to``; a dtype changes floating-point tensors alone."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else None, non_blocking)

        return self._map(move)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def n_sequences(self) -> int:
        """How many sequences it holds."""
        return self.tensors()[0].shape[0]

    def tensors(self) -> list[Tensor]:
        """Every tensor in it, those of states within it included."""
        found: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            found.append(t)
            return t

        self._map(note)
        return found

    def _map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        values = {f.name: _map(getattr(self, f.name), function) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **values)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, State):
        return value._map(function)
    if isinstance(value, list):
        return [_map(v, function) for v in value]
    return value
