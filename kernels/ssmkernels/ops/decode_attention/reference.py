"""Attention over a cache: all its positions at once, and what is no key of the sequence hidden."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.ops.attention.reference import attend, in_window


def compute(a: Any) -> tuple[Tensor, Tensor]:
    q, k_cache, v_cache, lengths = a.q, a.k_cache, a.v_cache, a.lengths
    if a.block_table is not None:
        k_cache, v_cache = (_gather(pages, a.block_table, lengths) for pages in (k_cache, v_cache))
    position = torch.arange(k_cache.shape[1], device=q.device)
    of_query = lengths[:, None] - q.shape[1] + torch.arange(q.shape[1], device=q.device)  # (s l)
    distance = (position - of_query[..., None])[:, None]  # (s 1 l m)
    written = (position < lengths[:, None])[..., None, None]  # (s m 1 1)
    k, v = (torch.where(written, cache, 0) for cache in (k_cache, v_cache))  # a weight of 0 does not undo a NaN
    seen = in_window(distance, a.left, 0)
    out, lse = attend(q, k, v, distance, seen, a.scale, a.softcap, a.alibi_slopes, a.sinks)
    return out, lse if a.return_lse else lse.new_empty(0)


def _gather(pages: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """Pages (pages page_size h k) → each sequence's own (s m h k)."""
    start = torch.arange(block_table.shape[1], device=pages.device) * pages.shape[1]
    used = torch.where(start < lengths[:, None], block_table, 0)  # other entries may name no page at all
    return pages[used].flatten(1, 2)
