"""xLSTM's matrix memory in chunks of matrix products, in PyTorch.

Within a chunk of c tokens, with a = log σ(f), the state (C, n, m) that comes in, and the stabiliser of the recurrence::

    D_tj = a_{j+1} + … + a_t + i_j   for t ≥ j, else -∞      how much of token j is left at token t, a logarithm
    e_t  = a_1 + … + a_t + m                                 how much of the state
    m_t  = max(e_t, max_j D_tj)
    P    = exp(D - m_t) ∘ scale Q Kᵀ,   Q̃ = scale exp(e - m_t) ∘ Q
    Y    = (P V + Q̃ C) / (max(|P 1 + Q̃ n|, exp(-m_t)) + ε)
    C'   = exp(e_c - m_c) C + (F ∘ K)ᵀ V,   n' alike with 1 in the place of V,   F_j = exp(D_cj - m_c)

m_t is what the recurrence has at token t, so that ε counts as much here as there. Sums of a are never differences of
two longer sums.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ssmkernels.core.packing import pad
from ssmkernels.core.validate import precision
from ssmkernels.ops.mlstm.reference import denominator, log_sigmoid, scale_of
from ssmkernels.ops.ssd.tiled import segment_sums

CHUNK = 64  # tokens

State = tuple[Tensor, Tensor, Tensor]


def compute(a: Any) -> tuple[Tensor, ...]:
    wide = precision(a.q)
    q, k, v, i, f = (t.to(wide) for t in (a.q, a.k, a.v, a.i, a.f))
    q, decay = q * scale_of(a.scale, q), log_sigmoid(f)
    zeros = (torch.zeros_like(empty) for empty in a.declared.outputs(a)[1:])
    given = (a.initial_C, a.initial_n, a.initial_m)
    C, n, m = (zero if start is None else start for start, zero in zip(given, zeros, strict=True))
    if a.cu_seqlens is None:
        y, state = chunked(q, k, v, i, decay, (C, n, m))
        return y.to(a.q.dtype), *state
    index, mask = pad(a.cu_seqlens)

    def padded(t: Tensor, blank: float = 0.0) -> Tensor:
        return torch.where(mask.view(*mask.shape, *[1] * (t.ndim - 2)), t[0, index], blank)

    y, state = chunked(padded(q), padded(k), padded(v), padded(i, -torch.inf), padded(decay), (C, n, m))
    return y[mask][None].to(a.q.dtype), *state


def chunked(q: Tensor, k: Tensor, v: Tensor, i: Tensor, a: Tensor, state: State) -> tuple[Tensor, State]:
    """q, k (b l h k), v (b l h v), i, a (b l h) and the state before → Y (b l h v) and the state after.

    Where i is -∞ and a is 0, the state stays as it is.
    """
    if not v.shape[1]:
        return v, state
    ys = []
    for start in range(0, v.shape[1], CHUNK):
        parts = [rearrange(t[:, start : start + CHUNK], "b c h ... -> b h c ...") for t in (q, k, v, i, a)]
        y, state = _chunk(state, *parts)
        ys.append(rearrange(y, "b h c v -> b c h v"))
    return torch.cat(ys, dim=1), state


def _chunk(state: State, q: Tensor, k: Tensor, v: Tensor, i: Tensor, a: Tensor) -> tuple[Tensor, State]:
    C, n, m = state
    D = segment_sums(a) + i[..., None, :]  # (b h t j)
    e = a.cumsum(-1) + m[..., None]  # (b h t)
    m_t = torch.maximum(e, D.amax(-1))
    weights, carried = torch.exp(D - m_t[..., None]), torch.exp(e - m_t)[..., None]
    P, from_state = weights * (q @ k.mT), carried * q
    sums = P.sum(-1) + (from_state @ n[..., None])[..., 0]
    y = (P @ v + from_state @ C) / denominator(sums, m_t)[..., None]
    fed, left = weights[..., -1, :, None] * k, carried[..., -1, :]  # F ∘ K
    return y, (left[..., None] * C + fed.mT @ v, left * n + fed.sum(-2), m_t[..., -1])
