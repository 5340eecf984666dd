"""HyperAttention (Han et al. 2023, arXiv 2310.05869): blocks of sorted hashes, sampled columns, causal by halves."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ssmkernels import attention, merge_attention
from ssmkernels.core.autocast import without_autocast
from ssmkernels.core.recompute import recomputed
from ssmkernels.core.validate import precision
from ssmzoo.mixers._draws import UNIT
from ssmzoo.mixers._lsh import angular_ranks

AT_ONCE = 2**20  # logits of blocks that are held at a time

Attended = tuple[Tensor, Tensor]  # out (b l h d) and lse (b h l)


@dataclasses.dataclass(frozen=True)
class Hyper:
    """What approximates: random draws and sizes.

    Attributes:
        projections: ``(h, d, bits)``, of the angular hash.
        samples: int64 ``(h, n)``, in parts of ``UNIT``: of m keys those at floor(m samples / UNIT) are sampled.
        block_size: queries and keys of a block of the sorted ones.
        min_seq_len: shorter sequences are computed exactly.
    """

    projections: Tensor
    samples: Tensor
    block_size: int
    min_seq_len: int

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Algorithm 4: each half by itself, and the second half's queries over the first half's keys."""
        l = q.shape[1]
        if l <= max(1, self.min_seq_len):
            return exact(q, k, v, causal=True)
        half = l // 2
        early, late = slice(half), slice(half, l)
        first, second = (self.causal(q[:, part], k[:, part], v[:, part]) for part in (early, late))
        across = self.unmasked(q[:, late], k[:, early], v[:, early])
        out, lse = merge_attention((second[0], across[0]), (second[1], across[1]))
        return torch.cat([first[0], out], dim=1), torch.cat([first[1], lse], dim=2)

    def unmasked(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Algorithms 1 to 3, of l queries and m keys of which every query sees all."""
        l, m = q.shape[1], k.shape[1]
        if max(l, m) <= max(1, self.min_seq_len):
            return exact(q, k, v, causal=False)
        q_order, k_order = (
            angular_ranks(x, self.projections).transpose(1, 2).sort(stable=True).indices for x in (q, k)
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b h l d)
        sampled = (self.samples * m // UNIT).expand(q.shape[0], -1, -1)  # (b h n)
        k_sampled, v_sampled = (rows(x, sampled) for x in (k, v))
        place = k_order.argsort(-1).gather(2, sampled)  # of the sampled keys, among the sorted ones
        size = self.block_size
        whole = min(l, m) // size
        block = (place // size).clamp(max=whole)  # the last one has what is left of both
        q, k, v = rows(q, q_order), rows(k, k_order), rows(v, k_order)
        logits = q.shape[0] * q.shape[1] * size * (size + self.samples.shape[1])  # of a block
        at_once = max(1, AT_ONCE // max(1, logits))
        runs = [(first, min(whole, first + at_once)) for first in range(0, whole, at_once)]
        if whole * size < l:
            runs.append((whole, whole + 1))
        outs, lses = [], []
        for first, last in runs:
            span = slice(first * size, None if last > whole else last * size)
            parts = (x[:, :, span].unflatten(2, (last - first, -1)) for x in (q, k, v))
            own = block[:, :, None] == torch.arange(first, last, device=q.device)[:, None]
            out, lse = recomputed(_blocks, *parts, k_sampled, v_sampled, own, m)
            outs.append(out.flatten(2, 3))
            lses.append(lse.flatten(2, 3))
        back = q_order.argsort(-1)
        return rows(torch.cat(outs, 2), back).transpose(1, 2), torch.cat(lses, 2).gather(2, back)


def _blocks(q: Tensor, k: Tensor, v: Tensor, k_sampled: Tensor, v_sampled: Tensor, own: Tensor, m: int) -> Attended:
    """Blocks (b h n size d) over their own keys, and over those sampled (b h samples d) that are not their ``own``.

    A sampled key stands for m / samples keys.
    """
    wide, (size, samples) = precision(q), (k.shape[-2], k_sampled.shape[2])
    bias = torch.full(own.shape, math.log(m / samples), dtype=wide, device=q.device).masked_fill(own, -torch.inf)
    with without_autocast(q.device.type):
        keys, values = (
            torch.cat([x, sampled[:, :, None].expand(-1, -1, x.shape[2], -1, -1)], dim=-2).to(wide)
            for x, sampled in ((k, k_sampled), (v, v_sampled))
        )
        logits = (q.to(wide) / math.sqrt(q.shape[-1])) @ keys.mT  # (b h n size size+samples)
        logits[..., size:] += bias[:, :, :, None]
        top = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)  # -∞ less -∞ would be NaN
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        blind = total == 0
        total = total.masked_fill(blind, 1)
        out = weights @ values / total
    return out.to(v.dtype), (top + total.log()).masked_fill(blind, -torch.inf).squeeze(-1)


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Attended:
    found = attention(q, k, v, causal=causal, return_lse=True)
    assert isinstance(found, tuple)
    return found


def rows(x: Tensor, order: Tensor) -> Tensor:
    """x (b h l d) at places (b h n): (b h n d)."""
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3]))
