"""States of attention: the keys and values of all tokens so far, or of those that can still be seen."""

from ssmzoo.cache.calls import FEW, Cache, append, borders, empty, newest, positions
from ssmzoo.cache.kv import KVCache
from ssmzoo.cache.logits import Logits
from ssmzoo.cache.paged import PagedCache
from ssmzoo.cache.shared import PagedSharedCache, SharedCache

__all__ = [
    "FEW",
    "Cache",
    "KVCache",
    "Logits",
    "PagedCache",
    "PagedSharedCache",
    "SharedCache",
    "append",
    "borders",
    "empty",
    "newest",
    "positions",
]
