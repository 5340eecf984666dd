"""Which blocks each query sees: those on whose compressed keys it has the most weight (arXiv 2502.11089)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.autocast import without_autocast
from ssmkernels.core.forcing import unforced
from ssmkernels.core.validate import precision
from ssmkernels.native import eager

PIECE = 64  # compressed keys that the native kernel meets at once
SCORES = 2**20  # numbers that PyTorch holds at once while it selects: few enough to stay in the caches


def select_blocks(
    q: Tensor,
    k: Tensor,
    length: int,
    stretch: int,
    stride: int,
    block_size: int,
    n_selected: int,
    n_initial: int,
    n_local: int,
) -> Tensor:
    """The blocks of keys on which each query has the most weight, by compressed keys; alike for heads that share keys.

    Queries are the last l of ``length`` tokens. Compressed key i stands for the ``stretch`` tokens from i · ``stride``
    on, and query t sees those whose tokens all are at t or before. With p its softmax over these, summed over the query
    heads of a group, block j has (equations 8 to 10)::

        score_t[j] = Σ_m Σ_n p_t[(block_size / stride) j + m - n]     for 0 ≤ m < block_size / stride,
                                                                          0 ≤ n < stretch / stride

    The first ``n_initial`` and the latest ``n_local`` blocks are selected in any case, then those of the largest
    scores; of equal ones the earlier, and none whose score is NaN. No query selects a block that begins after it.

    Args:
        q: queries, ``(b, l, h, d)``.
        k: compressed keys, ``(b, n, h_kv, d)``.
        length: tokens so far.
        stretch: tokens of a compressed key; a multiple of ``stride``.
        stride: tokens from the beginning of one compressed key to that of the next.
        block_size: tokens of a block; a multiple of ``stride``.
        n_selected: blocks for each query, at least ``n_initial`` + ``n_local``.
        n_initial: the first ones.
        n_local: the latest ones, the query's own among them; at least 1.

    Returns:
        int32 ``(b, l, h_kv, n_selected)``, each block once, -1 where there are no more; as ``selected_attention`` takes
        them. It has no gradient.
    """
    sizes = Sizes(length, stretch, stride, block_size, n_selected, n_initial, n_local)
    q, k = q.detach(), k.detach()
    if unforced() and q.dtype in native.DTYPES and eager.ordinary(q.dtype, q, k) and eager.reachable(q=q, k=k):
        return by_kernel(q, k, sizes)
    return by_pytorch(q, k, sizes)


class Sizes(NamedTuple):
    """The numbers of :func:`select_blocks`, as it describes them."""

    length: int
    stretch: int
    stride: int
    block_size: int
    n_selected: int
    n_initial: int
    n_local: int


def by_kernel(q: Tensor, k: Tensor, sizes: Sizes) -> Tensor:
    """In the native CPU library (``cpu_selection.cpp``)."""
    (b, l, h, d), (n, g) = q.shape, k.shape[1:3]
    pieces = -(-n // PIECE)
    keys = F.pad(k.to(precision(q)), (0, 0, 0, 0, 0, pieces * PIECE - n))
    keys = keys.unflatten(1, (pieces, PIECE)).permute(0, 3, 1, 4, 2).contiguous()  # (b g pieces d PIECE)
    q, blocks = native.rows(q), torch.empty(b, l, g, sizes.n_selected, dtype=torch.int32)
    fields: dict[str, float] = {"q": q.data_ptr(), "keys": keys.data_ptr(), "blocks": blocks.data_ptr()}
    fields |= {"dtype": native.DTYPES[q.dtype], "batch": b, "l": l, "h": h, "g": g, "n": n, "d": d, **sizes._asdict()}
    fields |= dict(zip(("q_batch", "q_time", "q_head"), q.stride()[:3], strict=True))
    threads = native.threads(b * l * h * (n + 1) * d)
    native.run("select_blocks", {**fields, "threads": threads, "scale": 1 / math.sqrt(d)})
    return blocks


def by_pytorch(q: Tensor, k: Tensor, sizes: Sizes) -> Tensor:
    """In PyTorch, a few queries at a time, with the compressed keys that these see."""
    b, l, h, d = q.shape
    length, stretch, stride, block_size, n_selected, n_initial, n_local = sizes
    wide, heads = precision(q), k.shape[2]
    place = torch.arange(length - l, length, device=q.device)
    end = torch.arange(k.shape[1], device=q.device) * stride + stretch - 1
    keys = (k.to(wide) * d**-0.5).permute(0, 2, 3, 1)  # (b c d n)
    at_once = max(1, SCORES // max(1, b * h * k.shape[1]))
    found = []
    with without_autocast(q.device.type):
        for start in range(0, l, at_once):
            some = slice(start, min(l, start + at_once))
            first, last = length - l + some.start, length - l + some.stop - 1
            by_all, by_some = (max(0, (p + 1 - stretch) // stride + 1) for p in (first, last))  # keys that are seen
            grouped = q[:, some].to(wide).unflatten(2, (heads, -1)).transpose(1, 2)  # (b c l g d)
            logits = (grouped.flatten(2, 3) @ keys[..., :by_some]).unflatten(2, grouped.shape[2:4])
            hidden = end[by_all:by_some] > place[some, None, None]
            logits[..., by_all:].masked_fill_(hidden, -torch.inf)
            weights = logits.softmax(-1)
            sees_none = (place[some] + 1 < stretch)[:, None, None]
            weights = weights.masked_fill(sees_none, 0.0).sum(3)  # (b c l n)
            block = torch.arange(last // block_size + 1, device=q.device)
            own = place[some, None] // block_size
            scores = pooled(weights, len(block), stretch // stride, block_size // stride)
            forced = (block < n_initial) | (block > own - n_local)
            scores = scores.masked_fill(scores.isnan(), -torch.inf).masked_fill(forced, torch.inf)
            scores = scores.masked_fill(block > own, -torch.inf)
            found.append(best(scores, n_selected, stable=True).transpose(1, 2))
    return torch.cat(found, dim=1) if found else q.new_zeros(b, 0, heads, n_selected, dtype=torch.int32)


def pooled(weights: Tensor, blocks: int, overlap: int, per_block: int) -> Tensor:
    """Equation 9, ``(…, n) → (…, blocks)``: the weights of all compressed tokens that share tokens with a block."""
    size = blocks * per_block
    padded = F.pad(weights, (overlap - 1, size - weights.shape[-1]))
    spread = sum(padded[..., overlap - 1 - n : overlap - 1 - n + size] for n in range(overlap))
    assert isinstance(spread, Tensor)
    return spread.unflatten(-1, (blocks, per_block)).sum(-1)


def best(scores: Tensor, count: int, *, stable: bool = False) -> Tensor:
    """int32 ``(…, count)``: places of the largest scores ``(…, n)`` that are above -∞; -1 where there is no more.

    Of equal scores it takes the earlier where ``stable``, which costs a sort, and any otherwise.
    """
    padded = F.pad(scores, (0, count), value=-torch.inf)
    values, places = padded.sort(dim=-1, descending=True, stable=True) if stable else padded.topk(count, dim=-1)
    values, places = values[..., :count], places[..., :count]
    return torch.where(values > -torch.inf, places, -1).int()
