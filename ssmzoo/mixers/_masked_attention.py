"""What the mixers of sparse attention have in common: softmax attention to the keys that a pattern shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmkernels import attention
from ssmkernels.core.autocast import without_autocast
from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision
from ssmzoo.cache import FEW, KVCache
from ssmzoo.mixers._cached_heads import CachedHeads
from ssmzoo.mixers._pattern import Pattern, mask_of


class MaskedAttention(CachedHeads):
    """Softmax attention to the keys that a pattern shows; which one says the mixer made of it.

    The time grows with the blocks that are visible.
    """

    pattern: Pattern

    def check_block_size(self, block_size: int) -> None:
        """Raises ValueError for a block that masks cannot have."""
        if block_size < 1 or block_size % 8:
            raise ValueError(f"{type(self).__name__}: `block_size` must be a multiple of 8; got {block_size}")

    def mixing_flops(self, context: int) -> float:
        """4 · n_heads · head_dim for each key that a query sees, in the mean."""
        return 4 * self.n_heads * self.head_dim * self.pattern.seen(max(context, 1))

    def whole(self, x: Tensor, places: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(self.pattern, q, k, v)

    def further(self, q: Tensor, cache: KVCache, cu_seqlens: Tensor | None) -> Tensor:
        l, held = q.shape[1], cache.held
        if cu_seqlens is not None:
            outs = [q[:, :0]]
            for (sequence, span), length in zip(spans(cu_seqlens), held.tolist(), strict=True):
                one = slice(sequence, sequence + 1), slice(0, length)
                outs.append(_newest(self.pattern, q[:, span], cache.keys[one], cache.values[one]))
            return torch.cat(outs, dim=1)
        if l > FEW:
            return _newest(self.pattern, q, *cache.recent(l, -1)[:2])
        places = held[:, None] - l + torch.arange(l, device=q.device)
        return gathered(q, cache, *self.pattern.few(places, cache.longest))


def masked(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last queries of sequences, which begin with a block, (b l h d)."""
    out = attention(q, k, v, block_mask=mask_of(pattern, q.shape[1], k.shape[1], q.device))
    assert isinstance(out, Tensor)
    return out


def _newest(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Likewise, where the queries begin anywhere."""
    if not q.shape[1]:
        return q
    before = (k.shape[1] - q.shape[1]) % pattern.block  # queries that their first block has before them
    filled = torch.cat([q.new_zeros(q.shape[0], before, *q.shape[2:]), q], dim=1)
    return masked(pattern, filled, k, v)[:, before:]


def gathered(q: Tensor, cache: KVCache, keys: Tensor, seen: Tensor) -> Tensor:
    """A few queries (s l h d) over the keys at these places of the cache, and over no others: (s l h d).

    Args:
        keys, seen: as :meth:`Pattern.few` gives them; every query sees at least one.
    """
    row = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    head = torch.arange(q.shape[2], device=q.device)[:, None]
    place = keys.clamp(0, cache.longest - 1)
    wide = precision(q)
    k, v = (x[row, place, head].to(wide) for x in (cache.keys, cache.values))  # (s l h n d)
    with without_autocast(q.device.type):  # it would round logits to half precision
        logits = torch.einsum("slhd,slhnd->slhn", q.to(wide), k) / math.sqrt(q.shape[3])
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("slhn,slhnd->slhd", weights, v).to(q.dtype)
