"""Makers of block masks for ``attention(..., block_mask=)``: the patterns of sparse attention.

Each lists the visible blocks by arithmetic on whole blocks and looks into those alone that are visible in part. Every
maker takes ``q_len``, ``k_len`` (as many as queries if None) and ``block_size``, an int or (queries, keys); keys a
multiple of 8. Join masks with ``&`` and ``|``: Longformer is ``window(...) | global_tokens(...)``, BigBird these and
``random_blocks(...)``. Positions are those of attention: query i stands at key position p = i + k_len - q_len.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssmkernels.core.block_mask import BlockMask
from ssmkernels.core.mask_blocks import BlockSize, any_and_all, checked, ends, least_and_most, made
from ssmkernels.core.validate import check_range, window_bound

__all__ = [
    "BlockMask",
    "causal",
    "document",
    "from_function",
    "global_tokens",
    "prefix",
    "random_blocks",
    "strided",
    "whole_blocks",
    "window",
]


def from_function(
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    q_len: int,
    k_len: int | None = None,
    *,
    heads: int = 1,
    block_size: BlockSize = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """A mask from any function of indices, which is asked for every pair, a few million at a time.

    Args:
        f: takes int64 numbers of heads ``(n, 1, 1)``, queries ``(n, block_q, 1)`` and keys ``(n, 1, block_k)``; returns
            bool that broadcasts against all three, True where the query sees the key.
        heads: for how many heads to ask; 1 if all share the mask.
    """
    block_size = checked("from_function", q_len, k_len, block_size, heads=heads)
    k_len = q_len if k_len is None else k_len
    rows, columns = (-(-length // block) for length, block in zip((q_len, k_len), block_size, strict=True))
    every = torch.ones(heads, rows, columns, dtype=torch.bool, device=device)
    return made(f, q_len, k_len, block_size, ~every, every)


def causal(q_len: int, k_len: int | None = None, *, block_size: BlockSize = 128) -> BlockMask:
    """Keys up to the query's own position, as ``causal=True`` gives them."""
    checked("causal", q_len, k_len, block_size)
    return window(q_len, k_len, left=-1, right=0, block_size=block_size)


def window(q_len: int, k_len: int | None = None, *, left: int, right: int, block_size: BlockSize = 128) -> BlockMask:
    """Keys from ``left`` before the query's position to ``right`` after it, inclusive; -1 for no bound."""
    block_size = checked("window", q_len, k_len, block_size)
    for name, value in (("left", left), ("right", right)):
        if value < -1:
            raise ValueError(f"window: `{name}` must be at least 0, or -1 for no bound; got {value}")
    k_len = q_len if k_len is None else k_len
    shift = k_len - q_len
    left, right = window_bound(left), window_bound(right)
    low = -left if left >= 0 else -(q_len + k_len)
    high = right if right >= 0 else q_len + k_len
    (first_q, last_q), (first_k, last_k) = ends(q_len, k_len, block_size)
    nearest, furthest = first_k - last_q[:, None] - shift, last_k - first_q[:, None] - shift  # (rows columns)
    full = (nearest >= low) & (furthest <= high)
    partly = (furthest >= low) & (nearest <= high) & ~full

    def seen(_: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j - i - shift >= low) & (j - i - shift <= high)

    alike = (first_k - first_q[:, None])[partly]  # the same distance of both corners
    return made(seen, q_len, k_len, block_size, full[None], partly[None], alike)


def prefix(q_len: int, k_len: int | None = None, *, length: int, block_size: BlockSize = 128) -> BlockMask:
    """The first ``length`` keys for every query, the others causally (prefix LM: Raffel et al. 2020)."""
    check_range("prefix", 0, length=length)
    k_len = q_len if k_len is None else k_len
    block_size = checked("prefix", q_len, k_len, block_size)
    _, (first_k, last_k) = ends(q_len, k_len, block_size)
    full = (last_k < length).expand(1, -(-q_len // block_size[0]), -1)
    partly = (first_k < length) & ~full
    whole = made(lambda h, i, j: j < length, q_len, k_len, block_size, full, partly)
    return whole | causal(q_len, k_len, block_size=block_size)


def global_tokens(
    q_len: int, k_len: int | None = None, *, tokens: int | Tensor, block_size: BlockSize = 128
) -> BlockMask:
    """Some tokens see every key and are seen by every query (Longformer, arXiv 2004.05150, section 3.1).

    Args:
        tokens: the first so many keys, or integer ``(tokens)`` positions of keys.
    """
    k_len = q_len if k_len is None else k_len
    block_size = checked("global_tokens", q_len, k_len, block_size)
    positions = torch.arange(tokens) if isinstance(tokens, int) else tokens
    if positions.ndim != 1 or positions.is_floating_point() or ((positions < 0) | (positions >= k_len)).any():
        raise ValueError(f"global_tokens: `tokens` must be positions from 0 to {k_len - 1}; got {tokens!r}")
    is_global = torch.zeros(k_len + 1, dtype=torch.bool)  # the last one for queries before the first key
    is_global[positions] = True
    of_query = is_global[(torch.arange(q_len) + k_len - q_len).clamp(min=-1)]
    (rows_any, rows_all), (columns_any, columns_all) = (
        any_and_all(flags, block) for flags, block in zip((of_query, is_global[:k_len]), block_size, strict=True)
    )
    full = rows_all[:, None] | columns_all
    partly = (rows_any[:, None] | columns_any) & ~full

    def seen(_: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return of_query[i] | is_global[j]

    return made(seen, q_len, k_len, block_size, full[None], partly[None])


def random_blocks(
    q_len: int,
    k_len: int | None = None,
    *,
    count: int,
    heads: int = 1,
    seed: int = 0,
    causal: bool = False,
    beside: BlockMask | None = None,
    block_size: BlockSize = 128,
) -> BlockMask:
    """``count`` whole key blocks for each block of queries, drawn without repetition (BigBird, arXiv 2007.14062).

    Args:
        heads: how many draws; 1 if all heads share one.
        causal: draw only among blocks that hold a key that the queries' last one may see; the keys after a query are
            not hidden, which ``& causal(...)`` does.
        beside: draw none of the blocks in which this mask, of the same sizes, shows anything.
    """
    block_size = checked("random_blocks", q_len, k_len, block_size, heads=heads)
    check_range("random_blocks", 0, count=count)
    k_len = q_len if k_len is None else k_len
    (_, last_q), (first_k, _) = ends(q_len, k_len, block_size)
    rows, columns = len(last_q), len(first_k)
    drawn = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(seed))
    open_to = (first_k <= last_q[:, None] + k_len - q_len) if causal else torch.ones(rows, columns, dtype=torch.bool)
    if beside is not None:
        sizes = q_len, k_len, block_size
        if (beside.q_len, beside.k_len, beside.block_size) != sizes or beside.heads not in (1, heads):
            raise ValueError(
                f"random_blocks: `beside` must be for {q_len} queries and {k_len} keys in blocks of {block_size}, with "
                f"1 or {heads} heads; got {beside!r}"
            )
        open_to = open_to & (beside.grid().cpu() == -2)
    drawn.masked_fill_(~open_to, -1)
    best = drawn.topk(min(count, columns), dim=2).indices
    full = torch.zeros_like(drawn, dtype=torch.bool).scatter_(2, best, True) & open_to
    return whole_blocks(q_len, k_len, visible=full, block_size=block_size)


def whole_blocks(q_len: int, k_len: int | None = None, *, visible: Tensor, block_size: BlockSize = 128) -> BlockMask:
    """Blocks that are visible as a whole, and no others.

    Args:
        visible: bool ``(heads, rows, columns)``, of blocks; one head if all share the mask.
    """
    block_size = checked("whole_blocks", q_len, k_len, block_size)
    k_len = q_len if k_len is None else k_len
    grid = tuple(-(-length // block) for length, block in zip((q_len, k_len), block_size, strict=True))
    if visible.dtype != torch.bool or visible.ndim != 3 or visible.shape[0] < 1 or visible.shape[1:] != grid:
        raise ValueError(
            f"whole_blocks: `visible` must be bool (heads, {grid[0]}, {grid[1]}); "
            f"got {visible.dtype} {tuple(visible.shape)}"
        )
    nothing = torch.zeros_like(visible)
    return made(lambda h, i, j: torch.zeros(1, dtype=torch.bool), q_len, k_len, block_size, visible, nothing)


def strided(
    q_len: int,
    k_len: int | None = None,
    *,
    stride: int,
    local: int = 1,
    heads: int = 1,
    block_size: BlockSize = 128,
) -> BlockMask:
    """Every ``stride``-th key block, other ones for each head, and the blocks around the queries.

    So the heads share the whole context among them (S2-Attention, arXiv 2407.17678; after Child et al. 2019,
    arXiv 1904.10509). Whole blocks, both before and after the query: ``& causal(...)`` hides what comes after.

    Args:
        stride: in blocks; head h sees key block c where c - h is a multiple of it.
        local: how many key blocks on either side of the one where the queries' block ends, itself counted as one;
            0 for none.
        heads: 1 if all share the mask.
    """
    block_size = checked("strided", q_len, k_len, block_size, heads=heads)
    if stride < 1 or local < 0:
        raise ValueError(f"strided: `stride` must be at least 1 and `local` at least 0; got {stride} and {local}")
    check_range("strided", 0, stride=stride, local=local)
    k_len = q_len if k_len is None else k_len
    (_, last_q), (first_k, _) = ends(q_len, k_len, block_size)
    column = torch.arange(len(first_k))
    own = (last_q + k_len - q_len).div(block_size[1], rounding_mode="floor")[:, None]
    near = (column - own).abs() < local  # (rows columns)
    far = (column - torch.arange(heads)[:, None, None]) % stride == 0  # (heads 1 columns)
    return whole_blocks(q_len, k_len, visible=near | far, block_size=block_size)


def document(ids: Tensor, ids_k: Tensor | None = None, *, block_size: BlockSize = 128) -> BlockMask:
    """Keys of the query's own document.

    Args:
        ids: integer ``(q_len)``, the document of each query, in any order.
        ids_k: likewise ``(k_len)`` of each key; those of the queries if None.
    """
    ids_k = ids if ids_k is None else ids_k
    for name, value in (("ids", ids), ("ids_k", ids_k)):
        if value.ndim != 1 or value.is_floating_point() or value.is_complex():
            raise ValueError(f"document: `{name}` must be integers of one axis; got {value.dtype} {tuple(value.shape)}")
    q_len, k_len = len(ids), len(ids_k)
    block_size = checked("document", q_len, k_len, block_size)
    (least_q, most_q), (least_k, most_k) = (
        least_and_most(x.cpu().long(), block) for x, block in zip((ids, ids_k), block_size, strict=True)
    )
    one = (least_q == most_q)[:, None] & (least_k == most_k)
    full = one & (least_q[:, None] == least_k)
    partly = (least_q[:, None] <= most_k) & (least_k <= most_q[:, None]) & ~full
    q, k = ids.cpu(), ids_k.cpu()
    return made(lambda _, i, j: q[i] == k[j], q_len, k_len, block_size, full[None], partly[None])
