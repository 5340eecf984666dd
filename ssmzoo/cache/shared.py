"""Caches of one tensor, which serves as keys and as values."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ssmzoo.cache.kv import KVCache
from ssmzoo.cache.logits import Logits
from ssmzoo.cache.paged import PagedCache
from ssmzoo.cache.tokens import TokenCache


class SharedKeys(TokenCache):
    """A cache of one head, whose keys ``(s, m, 1, d)`` are values too.

    ``values``, here and in what its methods take and give, has width 0.
    """

    def decode(self, q: Tensor, logits: Logits) -> Tensor:
        """Attention of each sequence's newest tokens, q ``(s, l, h, d)``, over what is held: ``(s, l, h, d)``."""
        kept, _, lengths, table = self.cached(q, logits)
        kept = kept.to(q.dtype)
        return logits.decode(q, kept, kept, lengths, table)


@dataclasses.dataclass
class SharedCache(SharedKeys, KVCache):
    """In one stretch of memory for each sequence."""


@dataclasses.dataclass
class PagedSharedCache(SharedKeys, PagedCache):
    """In pages."""

    dense_class = SharedCache
