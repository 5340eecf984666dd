"""Linear attention in chunks of matrix products, in PyTorch (arXiv 2312.06635, section 4).

Within a chunk of c tokens, with the state S that comes in, g the logarithms of the decays and all decays for each key
channel::

    E_ij = exp(g_{j+1} + … + g_i)  for i ≥ j, else 0            the decay from token j to token i
    P_ij = scale · Σ_k q_ik k_jk E_ijk                           what token i sees of token j
    O    = P V + scale (q ∘ E_i) S        E_i = exp(g_1 + … + g_i)
    S'   = diag(E_c) S + (k ∘ F_j)ᵀ V     F_j = exp(g_{j+1} + … + g_c)

With a bonus u, queries come before their token's decay: E_ij and E_i end at g_{i-1}, and P_ii has u in place of E_ii.

Every sum of logarithms is taken over its own terms, all at most 0: none is a difference of two others, and no decay is
ever divided by. That takes E for all pairs and channels, so chunks are short. The backward pass keeps the states
between segments of a few chunks, and computes each segment again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from ssmkernels.core.packing import pad
from ssmkernels.core.recompute import recomputed
from ssmkernels.core.validate import precision
from ssmkernels.ops.linear_attention.reference import scale_of

CHUNK = 16  # tokens
SEGMENT = 128  # tokens that are computed at once


def compute(a: Any) -> tuple[Tensor, Tensor]:
    wide = precision(a.q)
    _, empty = a.declared.outputs(a)
    S = torch.zeros_like(empty) if a.initial_state is None else a.initial_state
    q, k, v = (t.to(wide) for t in (scale_of(a.scale, a.k) * a.q.to(wide), a.k, a.v))
    shape = (*q.shape[:2], v.shape[2])
    if a.log_decay is None:
        g = q.new_zeros(*shape, 1)
    elif a.log_decay.ndim == 4:
        g = a.log_decay.to(wide)
    else:
        g = a.log_decay.to(wide).expand(shape)[..., None]
    bonus = None if a.bonus is None else a.bonus.to(wide)
    if a.cu_seqlens is None:
        o, S = _walk(q, k, v, g, bonus, S)
    else:
        index, mask = pad(a.cu_seqlens)

        def padded(t: Tensor) -> Tensor:
            return torch.where(mask[..., None, None], t[0, index], 0)

        # Where g and k are 0, the state stays as it is
        o, S = _walk(padded(q), padded(k), padded(v), padded(g), bonus, S)
        o = o[mask][None]
    return o.to(a.q.dtype), S


def _walk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (b l g k), v (b l h v), g (b l h k) or (b l h 1), S (b h k v) → o (b l h v) and the final S."""
    length, parts = v.shape[1], [v[:, :0] + 0 * q[:, :0].sum()]
    for start in range(0, length, SEGMENT):
        time = slice(start, min(start + SEGMENT, length))
        o, S = recomputed(_segment, q[:, time], k[:, time], v[:, time], g[:, time], bonus, S)
        parts.append(o)
    return torch.cat(parts, dim=1), S + 0 * g[:, :0].sum()


def _segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    length, heads = v.shape[1:3]
    c = min(CHUNK, length)
    q, k = (repeat(t, "b l g k -> b l (g r) k", r=heads // t.shape[2]) for t in (q, k))
    q, k, v, g = (
        rearrange(F.pad(t, (0, 0, 0, 0, 0, -length % c)), "b (m c) h k -> b h m c k", c=c) for t in (q, k, v, g)
    )
    lower = torch.ones(c, c, dtype=torch.bool, device=v.device).tril()
    sums = _segment_sums(g, lower)  # (b h m i j k)
    F_end = torch.exp(sums[..., -1, :, :])  # (b h m j k)
    to_query = g.cumsum(-2)
    if bonus is not None:
        sums, lower = sums.roll(1, -3), lower.tril(-1)  # a query comes one decay earlier
        to_query = F.pad(to_query[..., :-1, :], (0, 0, 1, 0))
    E = torch.exp(sums.masked_fill(~lower[..., None], -torch.inf))
    if g.shape[-1] == 1:
        P = (q @ k.mT) * E[..., 0]
    else:
        P = einsum(q, k, E, "b h m i k, b h m j k, b h m i j k -> b h m i j")
    if bonus is not None:
        P = P + torch.diag_embed((q * bonus[:, None, None] * k).sum(-1))
    fed = (k * F_end).mT @ v  # (b h m k v)
    whole = torch.exp(g.sum(-2))[..., None]  # (b h m k 1)
    incoming = []
    for m in range(fed.shape[2]):
        incoming.append(S)
        S = whole[:, :, m] * S + fed[:, :, m]
    o = P @ v + (q * torch.exp(to_query)) @ torch.stack(incoming, dim=2)
    return rearrange(o, "b h m c v -> b (m c) h v")[:, :length], S


def _segment_sums(g: Tensor, lower: Tensor) -> Tensor:
    """g (… c k) → (… i j k): g_{j+1} + … + g_i for i ≥ j, and 0 elsewhere."""
    terms = torch.where(lower.tril(-1)[..., None], g[..., :, None, :], 0)  # term i of the sum that begins after j
    return terms.cumsum(-3)
