"""Caches of one tensor, which serves as keys and as values."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ssmzoo.cache.kv import KVCache
from ssmzoo.cache.logits import Logits
from ssmzoo.cache.paged import PagedCache


@dataclasses.dataclass
class SharedCache(KVCache):
    """A :class:`~ssmzoo.cache.kv.KVCache` of one head, whose ``keys`` ``(s, capacity, 1, d)`` are values too.

    ``values``, here and in what its methods take and give, has width 0.
    """

    def decode(self, q: Tensor, logits: Logits) -> Tensor:
        """Attention of each sequence's newest tokens, q ``(s, l, h, d)``, over what is held: ``(s, l, h, d)``."""
        before = -1 if logits.window is None else logits.window[0]
        kept, _, lengths = self.recent(q.shape[1], before)
        kept = kept.to(q.dtype)
        return logits.decode(q, kept, kept, lengths)


@dataclasses.dataclass
class PagedSharedCache(PagedCache):
    """Likewise a :class:`~ssmzoo.cache.paged.PagedCache`."""

    def decode(self, q: Tensor, logits: Logits) -> Tensor:
        """Attention of each sequence's newest tokens, q ``(s, l, h, d)``, over what is held: ``(s, l, h, d)``."""
        kept, _, lengths, table = self.cached(q, logits)
        kept = kept.to(q.dtype)
        return logits.decode(q, kept, kept, lengths, table)
