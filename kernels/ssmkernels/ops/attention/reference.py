"""Attention as its formula stands: logits of all queries and keys, their softmax, the mean of the values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.block_mask import BlockMask
from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision
from ssmkernels.ops.attention import hidden


def compute(a: Any) -> tuple[Tensor, Tensor]:
    shown = None
    if a.block_offsets is not None:
        members = (a.block_offsets, a.block_columns, a.block_patterns, a.block_bits)
        shown = BlockMask(a.q.shape[1], a.k.shape[1], *members).dense()

    def one_batch(queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        q, k, v = a.q[:, queries], a.k[:, keys], a.v[:, keys]
        if a.q_positions is None:
            distance = distances(q.shape[1], k.shape[1], q.device)
        else:
            distance = apart(a.q_positions[:, queries], a.k_positions[:, keys])[:, None]
        seen = in_window(distance, a.left, a.right)
        if shown is not None:
            seen = seen & shown[:, queries, keys]  # shown (1 l m) or (h l m)
        return attend(q, k, v, distance, seen, a.scale, a.softcap, a.alibi_slopes, a.sinks)

    if a.cu_seqlens is None:
        out, lse = one_batch(slice(None), slice(None))
    else:
        parts = [one_batch(slice(0), slice(0))]
        for (_, queries), (_, keys) in zip(spans(a.cu_seqlens), spans(a.cu_seqlens_k), strict=True):
            parts.append(one_batch(queries, keys))
        out = torch.cat([out for out, _ in parts], dim=1)
        lse = torch.cat([lse for _, lse in parts], dim=2)
    return out, lse if a.return_lse else lse.new_empty(0)


def distances(l: int, m: int, device: torch.device) -> Tensor:
    """j - p for query positions p = i + m - l and key positions j: ``(l, m)``."""
    return torch.arange(m, device=device) - torch.arange(m - l, m, device=device)[:, None]


def apart(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """r - p for queries at positions p (… l) and keys at r (… m): ``(…, l, m)``."""
    return k_positions[..., None, :] - q_positions[..., None]


def in_window(distance: Tensor, left: int, right: int) -> Tensor:
    """Whether a query sees a key at this distance."""
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    return seen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention for a given ``distance``, (l m) or (b 1 l m), and ``seen``, these or (h l m).

    Gives out (b l h v) and lse (b h l).
    """
    wide = precision(q)
    h, h_kv = q.shape[2], k.shape[2]
    grouped = q.to(wide).unflatten(2, (h_kv, h // h_kv))  # (b l c g k): g query heads share the keys of head c
    s = torch.einsum("blcgk,bmck->bcglm", grouped, k.to(wide)).flatten(1, 2) * scale  # (b h l m)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(wide)[:, None, None] * distance.abs()
    s = s.masked_fill(~seen, -torch.inf)

    logits = s
    if sinks is not None:
        logits = torch.cat([s, sinks.to(wide)[:, None, None].expand(*s.shape[:3], 1)], dim=-1)  # (b h l m+1)
    blind = (logits == -torch.inf).all(-1, keepdim=True)  # -∞ less -∞ would be NaN, in the gradient too
    lse = logits.masked_fill(blind, 0).logsumexp(-1, keepdim=True)  # (b h l 1)
    weights = torch.exp(s - lse).unflatten(1, (h_kv, h // h_kv))  # (b c g l m), 0 for what is not seen
    out = torch.einsum("bcglm,bmcv->blcgv", weights, v.to(wide)).flatten(2, 3)  # (b l h v)
    if hidden.spread(out):
        v = v.to(wide).repeat_interleave(h // h_kv, dim=2).transpose(1, 2).flatten(0, 1)  # (b·h m v)
        v, met = hidden.met((s != -torch.inf).flatten(0, 1), v)
        careful = torch.bmm(weights.flatten(1, 2).flatten(0, 1), v).masked_fill(met, torch.nan)  # (b·h l v)
        out = hidden.repaired(out, careful.unflatten(0, s.shape[:2]).transpose(1, 2))
    return out.to(q.dtype).contiguous(), lse.masked_fill(blind, -torch.inf).squeeze(-1)
