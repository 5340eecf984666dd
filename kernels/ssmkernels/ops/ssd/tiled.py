"""The state-space dual in chunks of matrix products, in PyTorch (arXiv 2405.21060, section 6).

Within a chunk of c tokens, with X = Δ ∘ x, a = Δ A, and the state S that comes in::

    L_ij = exp(a_{j+1} + … + a_i)  for i ≥ j, else 0         the decay from token j to token i
    Y    = (L ∘ C Bᵀ) X + E ∘ (C Sᵀ)                          E_i = exp(a_1 + … + a_i)
    S'   = E_c S + (F ∘ X)ᵀ B                                 F_j = exp(a_{j+1} + … + a_c), the last row of L

All but the walk of S from chunk to chunk is done for all chunks at once. The sums of a are never differences of two
longer sums, which would lose their digits: terms outside of a sum are made 0 before it is taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ssmkernels.core.packing import pad
from ssmkernels.core.validate import precision
from ssmkernels.ops.ssd.reference import finished, step_size

CHUNK = 64  # tokens: L then takes as much memory as an activation with a head dim of 64


def compute(a: Any) -> tuple[Tensor, Tensor]:
    wide = precision(a.x)
    x, B, C = (t.to(wide) for t in (a.x, a.B, a.C))
    delta = step_size(a.dt, a.dt_bias, a.dt_softplus, a.dt_limit)  # (b l h)
    X, decay = delta[..., None] * x, delta * a.A.to(wide)
    y, final_state = dual(X, decay, B, C, a.initial_state, a.chunk_size, a.cu_seqlens)
    return finished(y, x, a.D, a.z).to(a.x.dtype), final_state


def dual(
    X: Tensor, a: Tensor, B: Tensor, C: Tensor, S: Tensor | None, size: int | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`chunked`, of packed sequences too: X (b l h p) and log decays a (b l h) → Y (b l h p) and the final S."""
    size = size or CHUNK
    if cu_seqlens is None:
        return chunked(X, a, B, C, S, size)
    index, mask = pad(cu_seqlens)

    def padded(t: Tensor) -> Tensor:
        return torch.where(mask.view(*mask.shape, *[1] * (t.ndim - 2)), t[0, index], 0)

    # Where a and X are 0, the state stays as it is
    y, S = chunked(padded(X), padded(a), padded(B), padded(C), S, size)
    return y[mask][None], S


def chunked(X: Tensor, a: Tensor, B: Tensor, C: Tensor, S: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """X (b l h p), a (b l h), B, C (b l g n), S (b h p n) → Y (b l h p) and the final S."""
    length, groups, p, n = X.shape[1], B.shape[2], X.shape[3], B.shape[3]
    c = min(size, max(length, 1))
    missing = -length % c if length else c
    X, a, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)) for t in (X, a, B, C))
    X = rearrange(X, "b (k c) (g r) p -> b k g r c p", c=c, g=groups)  # k chunks, r heads in a group
    a = rearrange(a, "b (k c) (g r) -> b k g r c", c=c, g=groups)
    B, C = (rearrange(t, "b (k c) g n -> b k g c n", c=c) for t in (B, C))

    L = torch.exp(segment_sums(a))  # (b k g r i j)
    E = torch.exp(a.cumsum(-1))  # (b k g r i)
    G = einsum(C, B, "b k g i n, b k g j n -> b k g i j")
    Y = (L * G[:, :, :, None]) @ X
    fed = einsum(L[..., -1, :, None] * X, B, "b k g r j p, b k g j n -> b k g r p n")

    S = (
        X.new_zeros(X.shape[0], *X.shape[2:4], p, n)
        if S is None
        else rearrange(S, "b (g r) p n -> b g r p n", g=groups)
    )
    incoming = []
    for k in range(X.shape[1]):
        incoming.append(S)
        S = E[:, k, ..., -1, None, None] * S + fed[:, k]
    from_state = einsum(C, torch.stack(incoming, dim=1), "b k g i n, b k g r p n -> b k g r i p")
    Y = rearrange(Y + E[..., None] * from_state, "b k g r c p -> b (k c) (g r) p")
    return Y[:, :length], rearrange(S, "b g r p n -> b (g r) p n")


def segment_sums(a: Tensor) -> Tensor:
    """a (... c) → (... i j): a_{j+1} + … + a_i for i ≥ j, and -∞ elsewhere."""
    c = a.shape[-1]
    lower = torch.ones(c, c, dtype=torch.bool, device=a.device).tril()
    terms = torch.where(lower.tril(-1), a[..., :, None], 0)
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)
