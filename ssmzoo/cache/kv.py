"""The state of attention: keys and values of all tokens so far, or of those that can still be seen."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.cache.logits import Logits
from ssmzoo.state import State

C = TypeVar("C", bound="KVCache")

SMALLEST = 64  # positions that a cache sets aside when it first grows


@dataclasses.dataclass
class KVCache(State):
    """Keys and values of each sequence's tokens; sequences may differ in length.

    Attributes:
        keys: ``(s, capacity, h_kv, k)``, in the activations' dtype. Of a sequence's tokens those from ``starts``
            on lie here, one after another; what lies past them has no meaning.
        values: ``(s, capacity, h_kv, v)``.
        lengths: int32 ``(s)``, tokens of each sequence so far.
        starts: int32 ``(s)``, how many of them have been dropped; None if they never are.
        keep: how many of the newest tokens those to come will see; None, as ``starts`` is then, for all.
        longest: no sequence holds more tokens; known without asking the device.
        even: each sequence holds exactly ``longest`` tokens.
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

    @property
    def held(self) -> Tensor:
        """int32 ``(s)``: tokens of each sequence that are here."""
        return self.lengths if self.starts is None else self.lengths - self.starts

    def append(self, k: Tensor, v: Tensor, differentiable: bool) -> None:
        """Adds the same number of tokens to each sequence, at its own end.

        Args:
            k, v: ``(s, l, h_kv, k)`` and ``(s, l, h_kv, v)``.
            differentiable: whether gradients will flow through the cache: then it is copied, not overwritten.
        """
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

    def append_packed(self, k: Tensor, v: Tensor, cu_seqlens: Tensor, differentiable: bool) -> None:
        """Adds to each sequence its own number of tokens, possibly none. Reads the lengths on the host.

        Args:
            k, v: ``(1, total, h_kv, k)`` and ``(1, total, h_kv, v)``.
            cu_seqlens: int32 ``(s + 1)``.
            differentiable: as in :meth:`append`.
        """
        on_host = (self.held + cu_seqlens.diff()).tolist()
        longest = max(on_host, default=0)
        self._make_room(longest, k.dtype, differentiable)
        row, step = owners(cu_seqlens, k.shape[1])
        position = self.held[row] + step
        self.keys[row, position] = k[0]
        self.values[row, position] = v[0]
        self.lengths = self.lengths + cu_seqlens.diff()
        self.longest, self.even = longest, min(on_host, default=0) == longest

    def places(self, cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Sequence and position, ``(total)`` each, of packed tokens that are about to come."""
        row, step = owners(cu_seqlens, total)
        return row, self.lengths[row] + step

    def packed(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is held of the chosen sequences, one after another. Reads their lengths on the host.

        Args:
            which: bool ``(s)``; the others count as empty.

        Returns:
            keys ``(1, total, h_kv, k)``, values ``(1, total, h_kv, v)`` and their borders, int32 ``(s + 1)``.
        """
        cu_seqlens = F.pad(torch.where(which, self.held, 0).cumsum(0), (1, 0)).int()
        row, position = owners(cu_seqlens, int(cu_seqlens[-1]))
        return self.keys[row, position][None], self.values[row, position][None], cu_seqlens

    def recent(self, count: int, before: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the newest tokens of each sequence can see, on the device alone.

        Args:
            count: how many of each sequence count as the newest.
            before: how many tokens before its own each of them sees; -1 for all.

        Returns:
            keys ``(s, m, h_kv, k)`` and values ``(s, m, h_kv, v)``, and how many of the m belong to each
            sequence, int32 ``(s)``.
        """
        # Where all sequences are equally long, keys before every window need not be read.
        start = max(0, self.longest - count - before) if before >= 0 and self.even else 0
        here = slice(start, self.longest)
        return self.keys[:, here], self.values[:, here], self.held - start

    def decode(self, q: Tensor, logits: Logits) -> Tensor:
        """Attention of each sequence's newest tokens, q ``(s, l, h, k)``, over what is held: ``(s, l, h, v)``."""
        before = -1 if logits.window is None else logits.window[0]
        return logits.decode(q, *self.recent(q.shape[1], before))

    def trim(self) -> None:
        """Drops what no token to come will see, once that is as much as what it will: each token is moved about once.

        Nothing is written into what a backward pass may still need, nor is anything asked of the device.
        """
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


def owners(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Each packed token's sequence, and its place within that: int64 and int32, ``(total)`` each."""
    token = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    row = torch.bucketize(token, cu_seqlens[1:], right=True)
    return row, token - cu_seqlens[row]
