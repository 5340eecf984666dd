"""The state of attention: keys and values of all tokens so far, or of those that can still be seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.ops.decode_attention.token import Place
from ssmzoo.cache.tokens import TokenCache, laid_out, owners
from ssmzoo.state import State

C = TypeVar("C", bound="KVCache")

SMALLEST = 64  # positions that a cache sets aside when it first grows


@dataclasses.dataclass
class KVCache(TokenCache):
    """Keys and values in one stretch of memory for each sequence; further attributes as :class:`TokenCache` has them.

    Attributes:
        keys: ``(s, capacity, h_kv, k)``, in the activations' dtype. Of a sequence's tokens those from ``starts``
            on lie here, one after another; what lies past them has no meaning.
        values: ``(s, capacity, h_kv, v)``.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    starts: Tensor | None = None
    keep: int | None = None
    longest: int = 0
    even: bool = True

    @classmethod
    def empty(cls: type[C], like: Tensor, shape: tuple[int, int, int, int], capacity: int, keep: int | None) -> C:
        """No tokens yet.

        Args:
            like: gives dtype and device.
            shape: s, h_kv, and the head dims of keys and of values.
            capacity: positions to set aside, but never more than it will use.
            keep: as the attribute.
        """
        s, h_kv, *head_dims = shape
        capacity = capacity if keep is None else min(capacity, _room(keep))
        keys, values = (like.new_zeros(s, capacity, h_kv, head_dim) for head_dim in head_dims)
        lengths = torch.zeros(s, dtype=torch.int32, device=like.device)
        return cls(keys, values, lengths, None if keep is None else torch.zeros_like(lengths), keep)

    def append(self, k: Tensor, v: Tensor, differentiable: bool) -> None:
        l = k.shape[1]
        self._make_room(self.longest + l, k.dtype, differentiable)
        if self.even:
            self.keys[:, self.longest : self.longest + l] = k
            self.values[:, self.longest : self.longest + l] = v
        else:
            row = torch.arange(k.shape[0], device=k.device)[:, None]
            position = self.held[:, None] + torch.arange(l, device=k.device)
            self.keys[row, position] = k
            self.values[row, position] = v
        self.lengths = self.lengths + l  # not in place: a backward pass may still need the old ones
        self.longest += l

    @property
    def heads(self) -> tuple[torch.Size, torch.Size]:
        return self.keys.shape[2:], self.values.shape[2:]

    @property
    def layout(self) -> tuple[object, ...] | None:
        return laid_out(self, self.keys, self.values, len(self.keys)) if type(self) is KVCache else None

    def take_token(self, dtype: torch.dtype) -> Place:
        self._make_room(self.longest + 1, dtype, False)
        positions, before = self.lengths, self.held
        low, high = before.aminmax()
        if int(high) > self.longest or int(low) < 0:
            raise ValueError(
                f"KVCache: `lengths` must be from 0 to {self.longest} beyond `starts`, as `longest` says; got {before}"
            )
        self.lengths = positions + 1
        self.longest += 1
        after = self.lengths if self.starts is None else before + 1
        return Place(self.keys, self.values, None, positions, before, after, self.longest)

    def append_packed(self, k: Tensor, v: Tensor, cu_seqlens: Tensor, differentiable: bool) -> None:
        on_host = (self.held + cu_seqlens.diff()).tolist()
        longest = max(on_host, default=0)
        self._make_room(longest, k.dtype, differentiable)
        row, step = owners(cu_seqlens, k.shape[1])
        position = self.held[row] + step
        self.keys[row, position] = k[0]
        self.values[row, position] = v[0]
        self.lengths = self.lengths + cu_seqlens.diff()
        self.longest, self.even = longest, min(on_host, default=0) == longest

    def at(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys[row, position], self.values[row, position]

    def recent(self, count: int, before: int) -> tuple[Tensor, Tensor, Tensor]:
        # Where all sequences are equally long, keys before every window need not be read.
        start = max(0, self.longest - count - before) if before >= 0 and self.even else 0
        here = slice(start, self.longest)
        return self.keys[:, here], self.values[:, here], self.held - start

    def stored(self: C) -> C:
        keys, values = self.keys[:, : self.longest], self.values[:, : self.longest]
        return State.stored(dataclasses.replace(self, keys=keys, values=values))

    def _concatenated(self: C, states: Sequence[C]) -> C:
        joined = super()._concatenated([dataclasses.replace(s, even=self.even, longest=self.longest) for s in states])
        joined.longest = max(state.longest for state in states)
        joined.even = all(state.even and state.longest == joined.longest for state in states)
        return joined

    def _concatenated_field(self, name: str, values: list[Any]) -> Any:
        """As every state's; what lies past a row's tokens has no meaning, and a shorter one is filled up."""
        if isinstance(values[0], Tensor) and values[0].ndim > 1:
            room = max(x.shape[1] for x in values)
            values = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, room - x.shape[1])) for x in values]
        return super()._concatenated_field(name, values)

    def trim(self) -> None:
        """As :meth:`TokenCache.trim`, once that is as much as what is kept: each token is moved about once."""
        if self.keep is None or self.starts is None or self.longest < _room(self.keep):
            return
        first = (self.held - self.keep).clamp(min=0)
        self.keys, self.values = (self._newest(x, first, self.keep) for x in (self.keys, self.values))
        self.starts, self.longest = self.starts + first, self.keep

    def _newest(self, x: Tensor, first: Tensor, keep: int) -> Tensor:
        """Of each sequence ``keep`` tokens from ``first`` on, with room for more."""
        if self.even:
            kept = x[:, self.longest - keep : self.longest]
        else:
            row = torch.arange(x.shape[0], device=x.device)[:, None]
            place = first[:, None] + torch.arange(keep, device=x.device)  # within: longest ≥ keep
            kept = x[row, place]
        return torch.cat([kept, kept.new_zeros(x.shape[0], _room(keep) - keep, *x.shape[2:])], dim=1)

    def _make_room(self, needed: int, dtype: torch.dtype, differentiable: bool) -> None:
        """Room for ``needed`` positions, in a new cache where gradients flow through the old or the new."""
        capacity = self.keys.shape[1]
        renew = differentiable or self.keys.requires_grad or self.values.requires_grad
        if needed <= capacity and self.keys.dtype == dtype and not renew:
            return
        room = needed if renew else capacity if needed <= capacity else max(needed, 2 * capacity, SMALLEST)
        if self.keep is not None:
            room = max(needed, min(room, _room(self.keep)))
        self.keys, self.values = (self._moved(x, room, dtype) for x in (self.keys, self.values))

    def _moved(self, x: Tensor, room: int, dtype: torch.dtype) -> Tensor:
        kept = x[:, : min(self.longest, room)].to(dtype)
        return torch.cat([kept, kept.new_zeros(x.shape[0], room - kept.shape[1], *x.shape[2:])], dim=1)


def _room(keep: int) -> int:
    """Positions that a cache has where ``keep`` of them can still be seen."""
    return keep + max(keep, SMALLEST)
