"""What mixers whose state is a cache have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.crossing import crossing, current, in_whole
from ssmzoo.cache.elastic import asked_page_size
from ssmzoo.cache.kv import KVCache
from ssmzoo.cache.logits import Logits
from ssmzoo.cache.paged import PagedCache
from ssmzoo.cache.tokens import owners

Cache = KVCache | PagedCache  # one interface: append, append_packed, places, packed, recent, decode, trim

FEW = 8  # new tokens up to which a call on a filled cache counts as decoding


def empty(
    kind: type[Cache],
    like: Tensor,
    shape: tuple[int, int, int, int],
    capacity: int,
    keep: int | None,
    page_size: int | None,
) -> Cache:
    """A cache of this kind without tokens: its own ``empty``, where ``page_size`` goes with kinds that have pages.

    Within :func:`~ssmzoo.cache.elastic.elastic` it is in pages in any case.
    """
    asked = asked_page_size()
    if page_size is None and asked is not None:
        kind, page_size = _paged(kind), asked
    if issubclass(kind, PagedCache):
        assert page_size is not None
        return kind.empty(like, shape, capacity, keep, page_size)
    return kind.empty(like, shape, capacity, keep)


def _paged(dense: type[Cache]) -> type[PagedCache]:
    """The kind in pages of a kind in one stretch of memory."""
    kinds = [PagedCache]
    for kind in kinds:  # which grows
        if kind.dense_class is dense:
            return kind
        kinds += kind.__subclasses__()
    raise TypeError(f"elastic: `kind` must be a cache that has a kind in pages; got {dense.__name__}")


def positions(x: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
    """Where in its sequence each token of x ``(b, l, …)`` stands: ``(b, l)``, or ``(1, l)`` if the same for all."""
    l = x.shape[1]
    if cu_seqlens is None:
        steps = torch.arange(l, device=x.device)
        return steps[None] if cache is None else cache.lengths[:, None] + steps
    row, places = owners(cu_seqlens, l) if cache is None else cache.places(cu_seqlens, l)
    return in_whole(row, places)[None]


def append(cache: Cache, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, queries: Tensor) -> None:
    """Adds new tokens to a cache, packed or not, as the gradients of what is to be computed from it allow.

    Args:
        cache: changed in place.
        k, v: of the new tokens, ``(b, l, h_kv, k)`` and ``(b, l, h_kv, v)``.
        cu_seqlens: their borders, or None.
        queries: what will meet the cache: their gradients need it as it is then.

    Raises:
        ValueError: the cache is one of other heads.
    """
    cache.check_heads(k, v)
    over = current()
    if over is not None:  # a cache holds whole sequences
        k, v, cu_seqlens = over.whole(k), over.whole(v), over.whole_cu_seqlens
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (queries, k, v))
    if cu_seqlens is None:
        cache.append(k, v, differentiable)
    else:
        cache.append_packed(k, v, cu_seqlens, differentiable)


def borders(x: Tensor, cache: Cache | None, cu_seqlens: Tensor | None, few: int = FEW) -> Tensor | None:
    """int32 ``(b + 1)``, with which a batch x ``(b, l, …)`` of more than a few tokens should be packed; mostly None.

    That is where sequences of several lengths go on together: no dense call knows at which positions they stand.
    ``few`` is how many tokens the caller can decode without that.
    """
    b, l = x.shape[:2]
    if cache is None or cache.even or cu_seqlens is not None or l <= few:
        return None
    return torch.arange(0, b * l + 1, l, dtype=torch.int32, device=x.device)


def newest(cache: Cache, q: Tensor, logits: Logits, cu_seqlens: Tensor | None) -> Tensor:
    """Attention of the newest tokens of each sequence, which the cache holds already, over all that they see.

    Args:
        q: ``(s, l, h, k)``; with ``cu_seqlens``, where sequences go on by several lengths, ``(1, l, h, k)``.
    """
    if cu_seqlens is not None:
        keys, values, cu_seqlens_k = cache.packed(cu_seqlens.diff() > 0)
        over = current()
        if over is not None:  # some of its tokens come after those here
            later = torch.where(cu_seqlens.diff() > 0, over.totals - over.starts - cu_seqlens.diff(), 0)
            borders_k = F.pad((cu_seqlens_k.diff() - later).cumsum(0), (1, 0)).int()
            row, step = owners(borders_k, int(borders_k[-1]))
            kept = cu_seqlens_k[row] + step
            keys, values, cu_seqlens_k = keys[:, kept], values[:, kept], borders_k
        with crossing(None):
            return logits.attention(q, keys, values, cu_seqlens, cu_seqlens_k)
    if q.shape[1] <= FEW:
        return cache.decode(q, logits)
    keys, values, _ = cache.recent(q.shape[1], -1 if logits.window is None else logits.window[0])
    return logits.attention(q, keys, values)
