"""What all caches of attention have in common, whatever their memory looks like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.ops.decode_attention.token import Place
from ssmzoo.cache.logits import Logits
from ssmzoo.state import State


class TokenCache(State):
    """Keys and values of each sequence's tokens; sequences may differ in length.

    Attributes:
        lengths: int32 ``(s)``, tokens of each sequence so far.
        starts: int32 ``(s)``, how many of them have been dropped; None if they never are.
        keep: how many of the newest tokens those to come will see; None, as ``starts`` is then, for all.
        longest: no sequence holds more tokens; known without asking the device.
        even: each sequence holds exactly ``longest`` tokens.
    """

    lengths: Tensor
    starts: Tensor | None
    keep: int | None
    longest: int
    even: bool

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
        raise NotImplementedError

    def append_packed(self, k: Tensor, v: Tensor, cu_seqlens: Tensor, differentiable: bool) -> None:
        """Adds to each sequence its own number of tokens, possibly none. Reads their numbers on the host.

        Args:
            k, v: ``(1, total, h_kv, k)`` and ``(1, total, h_kv, v)``.
            cu_seqlens: int32 ``(s + 1)``.
            differentiable: as in :meth:`append`.
        """
        raise NotImplementedError

    def at(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``(n, h_kv, k)`` and values ``(n, h_kv, v)`` at these positions, ``(n)`` each, of what is held."""
        raise NotImplementedError

    def recent(self, count: int, before: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the newest tokens of each sequence can see, on the device alone.

        Args:
            count: how many of each sequence count as the newest.
            before: how many tokens before its own each of them sees; -1 for all.

        Returns:
            keys ``(s, m, h_kv, k)`` and values ``(s, m, h_kv, v)``, and how many of the m belong to each
            sequence, int32 ``(s)``.
        """
        raise NotImplementedError

    def take_token(self, dtype: torch.dtype) -> Place:
        """As :meth:`append` of one token of each sequence, whose keys and values of this dtype the caller writes.

        Only where :attr:`layout` is not None, and no gradients are wanted.
        """
        raise NotImplementedError

    @property
    def heads(self) -> tuple[torch.Size, torch.Size]:
        """Heads and channels of each, of keys and of values."""
        raise NotImplementedError

    def check_heads(self, k: Tensor, v: Tensor) -> None:
        """Raises ValueError where keys and values ``(…, h_kv, channels)`` of a layer are none for this cache."""
        if (k.shape[-2:], v.shape[-2:]) != self.heads:
            (h, k_size), v_size = k.shape[-2:], v.shape[-1]
            (own_h, own_k), (_, own_v) = self.heads
            raise ValueError(
                f"{type(self).__name__}: `state` must have keys and values of {h} heads of {k_size} and {v_size} "
                f"channels, as the layer has; got {own_h} of {own_k} and {own_v}"
            )

    @property
    def layout(self) -> tuple[object, ...] | None:
        """What stays as it is while tokens come, for a caller of :meth:`take_token`; None where there may be none."""
        return None

    def trim(self) -> None:
        """Drops what no token to come will see. Nothing is asked of the device, nor is anything written into what a
        backward pass may still need."""
        raise NotImplementedError

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
        keys, values = self.at(*owners(cu_seqlens, int(cu_seqlens[-1])))
        return keys[None], values[None], cu_seqlens

    def cached(self, q: Tensor, logits: Logits) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values, lengths and, where there are pages, the table of them, for the newest tokens' queries."""
        before = -1 if logits.window is None else logits.window[0]
        return *self.recent(q.shape[1], before), None

    def decode(self, q: Tensor, logits: Logits) -> Tensor:
        """Attention of each sequence's newest tokens, q ``(s, l, h, k)``, over what is held: ``(s, l, h, v)``."""
        return logits.decode(q, *self.cached(q, logits))


def laid_out(cache: TokenCache, keys: Tensor, values: Tensor, rows: int) -> tuple[object, ...] | None:
    """The ``layout`` of a cache of so many sequences, with keys and values ``(…, h_kv, channels)``.

    None where a native kernel cannot read it as it is: on another device, with channels or counts that lie apart, or
    with tensors that do not belong together.
    """
    if keys.shape[:3] != values.shape[:3]:
        return None
    for x in (keys, values):
        if x.device.type != "cpu" or x.stride(-1) != 1 < x.shape[-1]:
            return None
    for counts in (cache.lengths, cache.starts):
        if counts is not None and (
            counts.dtype != torch.int32
            or counts.device.type != "cpu"
            or counts.shape != (rows,)
            or not counts.is_contiguous()
        ):
            return None
    return type(cache), rows, keys.shape[2:], values.shape[2:], cache.keep


def owners(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Each packed token's sequence, and its place within that: int64 and int32, ``(total)`` each."""
    token = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    row = torch.bucketize(token, cu_seqlens[1:], right=True)
    return row, token - cu_seqlens[row]
