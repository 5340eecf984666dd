"""What a mixer carries from one call to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def select(self: S, indices: Tensor | Sequence[int] | Sequence[bool]) -> S:
        """The given sequences in the given order, as a copy: reorders, repeats (for beams) or drops them.

        Args:
            indices: ints ``(n)``, each a row; or bools ``(s)``, a mask that keeps the rows where it is True.

        Raises:
            TypeError, ValueError, IndexError: ``indices`` are neither, of another shape, or out of range.
        """
        chosen = row_indices(indices, lambda: self.n_sequences)

        def rows(part: P) -> P:
            if isinstance(part, State):
                return part.select(chosen)
            return part.index_select(0, chosen.to(part.device))

        return self._map(rows)

    def closed_up(self: S, rows: Sequence[int]) -> S:
        """As :meth:`select` of :func:`closing` rows, in this state's own memory: it is of no use any more afterwards.

        Only rows that move are copied; the memory of those that are gone stays with the others.
        """

        def close(part: P) -> P:
            if isinstance(part, State):
                return part.closed_up(rows)
            if any(step == 0 and size > 1 for size, step in zip(part.shape, part.stride(), strict=True)):
                return part.index_select(0, torch.tensor(rows, device=part.device))
            for i, row in enumerate(rows):
                if row != i:
                    part[i] = part[row]
            return part[: len(rows)]

        return self._map(close)

    def to(self: S, *args: Any, **kwargs: Any) -> S:
        """Every tensor through ``Tensor.to``; a dtype changes floating-point tensors alone."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(part: P) -> P:
            if isinstance(part, State):
                return part.to(*args, **kwargs)
            return part.to(device, dtype if part.is_floating_point() else None, non_blocking)

        return self._map(move)

    @classmethod
    def concatenate(cls: type[S], states: Sequence[S]) -> S:
        """The sequences of several states of one model or mixer, those of the first one first, as a copy.

        They may have had different numbers of tokens. Where memory grows with length, the copy has room for the longest
        in each row; pages go into the first state's pool.

        Args:
            states: at least one, all of one kind.

        Raises:
            TypeError, ValueError: none, or states that do not go together.
        """
        if not states:
            raise ValueError("State.concatenate: `states` must hold at least one state; got none")
        first = states[0]
        for state in states:
            if type(state) is not type(first) or not isinstance(state, State):
                raise TypeError(
                    f"State.concatenate: `states` must all be of one kind; got {type(first).__name__} and "
                    f"{type(state).__name__}"
                )
        return first._concatenated(states)

    def nested(self) -> Iterator[State]:
        """Itself and every state within it."""
        yield self
        for value in vars(self).values():
            for part in value if isinstance(value, list) else (value,):
                if isinstance(part, State):
                    yield from part.nested()

    def stored(self: S) -> S:
        """A copy that holds no more than its own tokens, to be put away: see :meth:`restored`."""
        return self._map(lambda part: part.stored() if isinstance(part, State) else part.clone())

    def restored(self: S, stored: S) -> S:
        """What :meth:`stored` gave, with its pages in the pools of this state, which has no tokens yet."""
        pairs = {f.name: (getattr(self, f.name), getattr(stored, f.name)) for f in dataclasses.fields(self)}
        return dataclasses.replace(stored, **{name: _restored(*pair) for name, pair in pairs.items()})

    def with_tensors(self: S, tensors: Iterator[Tensor]) -> S:
        """The same with other tensors, in the order of :meth:`tensors`."""
        return self._map(lambda part: part.with_tensors(tensors) if isinstance(part, State) else next(tensors))

    def serves(self, kind: type[State]) -> bool:
        """Whether a mixer whose states are of this kind can work on it."""
        return isinstance(self, kind)

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
        raise ValueError(f"{type(self).__name__}: `n_sequences` is unknown, as the state holds no tensor")

    def tensors(self) -> list[Tensor]:
        """Every tensor in it, those of states within it included."""
        found: list[Tensor] = []

        def note(part: P) -> P:
            found.extend(part.tensors() if isinstance(part, State) else [part])
            return part

        self._map(note)
        return found

    def _concatenated(self: S, states: Sequence[S]) -> S:
        """As :meth:`concatenate`, where this is the first of the states and the others are of its kind."""
        fields = dataclasses.fields(self)
        values = {f.name: self._concatenated_field(f.name, [getattr(s, f.name) for s in states]) for f in fields}
        return dataclasses.replace(self, **values)

    def _concatenated_field(self, name: str, values: list[Any]) -> Any:
        """The values of a field, joined; kinds whose rows may differ in size override it."""
        first = values[0]
        if isinstance(first, State):
            return State.concatenate(values)
        if isinstance(first, list):
            return [self._concatenated_field(name, list(each)) for each in zip(*values, strict=True)]
        if isinstance(first, Tensor):
            return torch.cat(values)
        if any(value != first for value in values):
            raise ValueError(f"State.concatenate: `{name}` must be the same in all `states`; got {values!r:.80}")
        return first

    def _map(self: S, function: Callable[[Any], Any]) -> S:
        """The function's value of each tensor and of each state within it, in a state of the same kind."""
        values = {f.name: _map(getattr(self, f.name), function) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **values)


def _restored(empty: Any, stored: Any) -> Any:
    if isinstance(stored, State):
        return empty.restored(stored)
    if isinstance(stored, list):
        return [_restored(*pair) for pair in zip(empty, stored, strict=True)]
    return stored


def closing(staying: Sequence[int]) -> list[int]:
    """These rows, in rising order, so that the last ones fill the gaps and none of the others moves."""
    count = len(staying)
    last = [row for row in staying if row >= count]
    there = {row for row in staying if row < count}
    return [row if row in there else last.pop() for row in range(count)]


def row_indices(indices: object, n_sequences: Callable[[], int]) -> Tensor:
    """What :meth:`State.select` takes, as int64 ``(n)``: ints as they are, a mask as the rows that it keeps."""
    expected = "ints (n), or a mask of bools (s)"
    if isinstance(indices, Tensor):
        if indices.dtype.is_floating_point or indices.dtype.is_complex:
            raise TypeError(f"State.select: `indices` must be {expected}; got a tensor of {indices.dtype}")
        found = indices
    elif isinstance(indices, Iterable) and not isinstance(indices, str | bytes):
        values = list(indices)
        bools = [type(value).__name__ in ("bool", "bool_") for value in values]  # Python's, or numpy's
        if values and all(bools):
            found = torch.tensor([bool(value) for value in values])
        else:
            for value, is_bool in zip(values, bools, strict=True):
                if is_bool or not hasattr(value, "__index__"):
                    raise TypeError(f"State.select: `indices` must be {expected}; got {value!r:.80} among them")
            found = torch.tensor([int(value) for value in values], dtype=torch.long)
    else:
        raise TypeError(f"State.select: `indices` must be {expected}; got {type(indices).__name__}")
    if found.ndim != 1:
        raise ValueError(f"State.select: `indices` must be {expected}; got shape {tuple(found.shape)}")
    if found.dtype == torch.bool:
        if len(found) != n_sequences():
            raise ValueError(f"State.select: `indices` must be a mask of {n_sequences()} bools; got {len(found)}")
        return found.nonzero()[:, 0]
    found = found.long()
    if found.device.type == "cpu" and found.numel():
        low, high = (int(v) for v in found.aminmax())
        if low < 0 or high >= n_sequences():
            bad = low if low < 0 else high
            raise IndexError(f"State.select: `indices` must be from 0 to {n_sequences() - 1}; got {bad}")
    return found


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor | State):
        return function(value)
    if isinstance(value, list):
        return [_map(v, function) for v in value]
    return value
