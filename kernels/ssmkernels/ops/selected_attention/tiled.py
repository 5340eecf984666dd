"""Attention to selected blocks in PyTorch, one block of keys after another (arXiv 2205.14135, algorithm 1, its loops).

For each block the queries that selected it are gathered, so that all of them meet its keys in one matrix product. A
query carries along the largest logit so far, the sum of exponentials, and the sum of values that they weigh. The
backward pass keeps the log-sum-exp of each query, and computes each block once more. A few queries, as in decoding,
gather their keys instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.attention import hidden
from ssmkernels.ops.attention.native import SAVES, empty
from ssmkernels.ops.selected_attention import checked_blocks
from ssmkernels.ops.selected_attention._layout import (
    count,
    distinct,
    heads_last,
    key_row,
    keys_back,
    of_keys,
    of_queries,
    places,
    queries_of_blocks,
    sums_by_head,
    sums_of_queries,
)

__all__ = ["SAVES", "backward", "checked", "empty", "forward"]

FEW = 8  # queries up to which each gathers its own keys


def checked(a: Any) -> Any:
    return a._replace(blocks=checked_blocks(a.blocks, a.k.shape[1], a.block_size))


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    if a.q.is_meta:  # how many queries select a block, nobody knows
        return empty(a, save)
    whole = _gathered if a.q.shape[1] <= FEW and not save else _by_block
    return results(a, save, *whole(a))


def results(a: Any, save: bool, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """What ``forward`` returns, from out (b l h v) and lse (b h l) in the precision of sums."""
    rounded = out.to(a.q.dtype)
    exact = out if save and rounded is not out else out.new_empty(0)  # in half precision the gradient would suffer
    sums = lse.clone() if save else lse.new_empty(0)
    return rounded, lse if a.return_lse else lse.new_empty(0), exact, sums


def of_rows(a: Any, saved: Any, grads: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs' gradients (b·g l groups v), and (b·g l groups) lse and δ, what the softmax takes off every logit."""
    g, wide = a.blocks.shape[2], precision(a.q)
    out = saved.exact if saved.exact.numel() else saved.out
    do, out = (of_queries(t, g, wide) for t in (grads.out, out))
    delta = (do * out).sum(-1)  # Σ_j p_ij (do_i · v_j)
    if a.return_lse and grads.lse is not None:
        delta -= sums_of_queries(grads.lse, g)
    lse = sums_of_queries(saved.logsums, g)
    return do, lse.masked_fill(lse == -torch.inf, 0), delta  # nothing is visible to such a query


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor]:
    if a.q.is_meta:
        return {"q": torch.empty_like(a.q), "k": torch.empty_like(a.k), "v": torch.empty_like(a.v)}
    g, wide = a.blocks.shape[2], precision(a.q)
    q, (k, v) = of_queries(a.q, g, wide), (of_keys(t, wide) for t in (a.k, a.v))
    do, lse, delta = of_rows(a, saved, grads)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for block in _blocks(a):
        row, keys = block.row, block.keys
        k_j, v_j = k[block.key_row, keys], v[block.key_row, keys]
        q_i, do_i = (t[row].index_select(0, block.queries).flatten(0, 1) for t in (q, do))
        lse_i, delta_i = (t[row].index_select(0, block.queries).flatten() for t in (lse, delta))
        p = _logits(a, block, q_i, k_j).sub_(lse_i[:, None]).exp_()
        dv[block.key_row, keys] += p.T @ do_i
        ds = (do_i @ v_j.T).sub_(delta_i[:, None]).mul_(p)
        if block.partly:  # where a weight is 0 because a key is hidden, what that key holds must not come through
            _grouped(ds, block)[: block.partly].masked_fill_(block.hidden[:, None], 0)
        dk[block.key_row, keys] += ds.T @ q_i
        dq[row].index_add_(0, block.queries, (ds @ k_j).unflatten(0, (-1, q.shape[2])))
    dq, dk = dq.mul_(a.scale), dk.mul_(a.scale)
    return {"q": heads_last(dq, g), "k": keys_back(dk, a.k.shape[2]), "v": keys_back(dv, a.k.shape[2])}


class Block(NamedTuple):
    """A block of keys of one sequence, and the queries of one selecting head that see some of it.

    Attributes:
        row: of the queries, among sequences times selecting heads.
        key_row: of the keys, among sequences times heads of keys.
        keys: the block.
        queries: int64 ``(r)``, rising.
        partly: how many of these, the first ones, see only a part of it.
        hidden: bool ``(partly, keys)``, which keys these do not see.
    """

    row: int
    key_row: int
    keys: slice
    queries: Tensor
    partly: int
    hidden: Tensor


def _blocks(a: Any) -> Iterator[Block]:
    """All blocks that anything is seen of."""
    (b, l, g, _), (m, h_kv), size = a.blocks.shape, a.k.shape[1:3], a.block_size
    blocks, place = count(a), places(a)
    ordered, queries = queries_of_blocks(distinct(a), blocks)
    numbers, sizes = ordered.unique_consecutive(return_counts=True)
    start = 0
    for number, of_block in zip(numbers.tolist(), sizes.tolist(), strict=True):
        if number == b * g * blocks:
            return
        own = queries[start : start + of_block]
        start += of_block
        row, block = divmod(number, blocks)
        keys = slice(block * size, min(m, (block + 1) * size))
        partly = int(torch.searchsorted(own, keys.stop - 1 - (m - l)))  # those before the query at its last key
        key = torch.arange(keys.start, keys.stop, device=own.device)
        yield Block(row, key_row(row, g, h_kv), keys, own, partly, key > place[own[:partly], None])


def _by_block(a: Any) -> tuple[Tensor, Tensor]:
    """out (b l h v) in the precision of sums, and lse (b h l)."""
    wide, g = precision(a.q), a.blocks.shape[2]
    q, (k, v) = of_queries(a.q, g, wide), (of_keys(t, wide) for t in (a.k, a.v))
    groups = q.shape[2]
    top = q.new_full(q.shape[:3], torch.finfo(wide).min)  # and not -∞, as -∞ less -∞ is NaN
    total, mean = torch.zeros_like(top), q.new_zeros(*q.shape[:3], v.shape[2])
    careful = not hidden.finite(v)
    for block in _blocks(a):
        row, queries, v_j = block.row, block.queries, v[block.key_row, block.keys]
        q_i = q[row].index_select(0, queries).flatten(0, 1)  # (r·groups k)
        s = _logits(a, block, q_i, k[block.key_row, block.keys])
        before = top[row].index_select(0, queries).flatten()
        now = torch.maximum(before, s.amax(1))
        fades = torch.exp(before - now)
        p = s.sub_(now[:, None]).exp_()
        if careful:
            visible = torch.ones_like(p, dtype=torch.bool)
            _grouped(visible, block)[: block.partly].masked_fill_(block.hidden[:, None], False)
            clean, met = hidden.met(visible[None], v_j[None])
            new = (p @ clean[0]).masked_fill_(met[0], torch.nan)
        else:
            new = p @ v_j
        old = mean[row].index_select(0, queries).flatten(0, 1)
        weight = torch.addcmul(p.sum(1), total[row].index_select(0, queries).flatten(), fades)
        mean[row].index_copy_(0, queries, new.addcmul_(old, fades[:, None]).unflatten(0, (-1, groups)))
        total[row].index_copy_(0, queries, weight.unflatten(0, (-1, groups)))
        top[row].index_copy_(0, queries, now.unflatten(0, (-1, groups)))
    blind = total == 0
    out = mean / total.masked_fill(blind, 1)[..., None]
    lse = (top + total.log()).masked_fill_(blind, -torch.inf)
    return heads_last(out, g), sums_by_head(lse, g)


def _gathered(a: Any) -> tuple[Tensor, Tensor]:
    """The same where each query gathers its own keys."""
    (b, l, h, _), (_, m, h_kv, _), size = a.q.shape, a.k.shape, a.block_size
    g, wide, place = a.blocks.shape[2], precision(a.q), places(a)
    blocks = distinct(a).transpose(1, 2)
    keys = blocks[..., None] * size + torch.arange(size, device=blocks.device)  # (b l g n size)
    seen = (blocks[..., None] >= 0) & (keys <= place[:, None, None, None])
    seen, keys = seen.flatten(3), keys.flatten(3).clamp(0, max(0, m - 1))
    if not m:
        return a.q.new_zeros(b, l, h, a.v.shape[3], dtype=wide), a.q.new_full((b, h, l), -torch.inf, dtype=wide)
    row = torch.arange(b, device=keys.device)[:, None, None, None]
    head = (torch.arange(g, device=keys.device) // (g // h_kv))[:, None]
    k, v = (t[row, keys, head].to(wide) for t in (a.k, a.v))  # (b l g c d)
    q = a.q.to(wide).unflatten(2, (g, h // g))
    s = (q @ k.transpose(3, 4)).mul_(a.scale).masked_fill_(~seen[:, :, :, None], -torch.inf)  # (b l g groups c)
    lse = s.logsumexp(-1)
    weights = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = weights @ v.masked_fill(~seen[..., None], 0)
    return out.flatten(2, 3), lse.flatten(2, 3).transpose(1, 2).contiguous()


def _logits(a: Any, block: Block, q: Tensor, k: Tensor) -> Tensor:
    """(r·groups, keys of the block), -∞ where a query does not see the key."""
    s = (q @ k.T).mul_(a.scale)
    if block.partly:
        _grouped(s, block)[: block.partly].masked_fill_(block.hidden[:, None], -torch.inf)
    return s


def _grouped(x: Tensor, block: Block) -> Tensor:
    """(r·groups, c) as (r, groups, c)."""
    return x.view(len(block.queries), -1, x.shape[1])
