"""How the fast implementations lay out queries, keys and selections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def of_queries(x: Tensor, g: int, dtype: torch.dtype) -> Tensor:
    """(b l h d) → (b·g l groups d): the query heads that share a selection side by side."""
    return x.to(dtype).unflatten(2, (g, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def of_keys(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(b m h_kv d) → (b·h_kv m d)."""
    return x.to(dtype).transpose(1, 2).flatten(0, 1).contiguous()


def sums_of_queries(x: Tensor, g: int) -> Tensor:
    """(b h l) → (b·g l groups)."""
    return x.unflatten(1, (g, -1)).transpose(2, 3).flatten(0, 1).contiguous()


def heads_last(x: Tensor, g: int) -> Tensor:
    """(b·g l groups d) → (b l h d)."""
    return x.unflatten(0, (-1, g)).transpose(1, 2).flatten(2, 3).contiguous()


def sums_by_head(x: Tensor, g: int) -> Tensor:
    """(b·g l groups) → (b h l)."""
    return x.unflatten(0, (-1, g)).transpose(2, 3).flatten(1, 2).contiguous()


def keys_back(x: Tensor, h_kv: int) -> Tensor:
    """(b·h_kv m d) → (b m h_kv d)."""
    return x.unflatten(0, (-1, h_kv)).transpose(1, 2).contiguous()


def key_row(row: Any, g: int, h_kv: int) -> Any:
    """The keys, among b·h_kv, of selecting head ``row``, among b·g."""
    return row // g * h_kv + row % g // (g // h_kv)


def places(a: Any) -> Tensor:
    """int64 ``(l)``: where the queries stand among the keys."""
    l, m = a.q.shape[1], a.k.shape[1]
    return torch.arange(m - l, m, device=a.q.device)


def count(a: Any) -> int:
    """Blocks that the keys have."""
    return -(-a.k.shape[1] // a.block_size)


def distinct(a: Any) -> Tensor:
    """int64 ``(b, g, l, n)``: each query's blocks once and rising, -1 for those that begin after it and for none."""
    blocks = a.blocks.transpose(1, 2).long().sort(dim=3).values
    seen = (blocks >= 0) & (blocks < count(a)) & (blocks * a.block_size <= places(a)[:, None])
    seen[..., 1:] &= blocks[..., 1:] != blocks[..., :-1]
    return torch.where(seen, blocks, -1)


def queries_of_blocks(blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The queries of each block, rising, from the blocks of each query.

    Args:
        blocks: as :func:`distinct` gives them.
        count: blocks that there are.

    Returns:
        ``ordered``, the rising numbers row · count + block of all pairs of selecting head and query with a block, and
        b·g · count for no block; and the query of each, int64.
    """
    b, g, l, n = blocks.shape
    row = torch.arange(b * g, device=blocks.device).view(b, g, 1, 1)
    pairs = torch.where(blocks >= 0, row * count + blocks, b * g * count)
    ordered, order = pairs.flatten().sort(stable=True)
    return ordered, (order // max(1, n)) % max(1, l)
