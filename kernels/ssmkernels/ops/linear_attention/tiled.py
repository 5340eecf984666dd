"""Linear attention in chunks of matrix products, in PyTorch, forward and backward (arXiv 2312.06635, section 4).

Within a chunk of c tokens, with the state S that comes in, g the logarithms of the decays, and for each key channel::

    E_ij = exp(g_{j+1} + … + g_i)  for i ≥ j, else 0            the decay from token j to token i
    E_i  = exp(g_1 + … + g_i)                                   that from the chunk's start to token i
    F_j  = exp(g_{j+1} + … + g_c)                               that from token j to the chunk's end
    P_ij = Σ_k q_ik k_jk E_ijk                                  what token i sees of token j, queries scaled
    O    = P V + (E ∘ Q) S
    S'   = diag(E_c) S + (F ∘ K)ᵀ V

With a bonus u, queries come before their token's decay: E_ij and E_i end at g_{i-1}, and P_ii has u in place of E_ii.

The backward pass goes through the chunks from the last to the first, with dS' the gradient of the state after one::

    dV = Pᵀ dO + (F ∘ K) dS'                 dP = tril(dO Vᵀ)
    dQ_i = E_i ∘ S dO_i + Σ_j dP_ij E_ij ∘ k_j
    dK_j = F_j ∘ dS' v_j + Σ_i dP_ij E_ij ∘ q_i
    dS = E_c dS' + (E ∘ Q)ᵀ dO               du = Σ_i dP_ii q_i ∘ k_i

The gradient of g_t is the sum over all that decays at t: of pairs on both sides of it, of what later tokens take from
S, of what earlier ones leave in S', and of S itself. Every sum of logarithms is taken over its own terms, all at most
0: none is a difference of two others, and no decay is ever divided by. Only the states between chunks are kept, and
these only during the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.delta_rule.tiled import Layout, before, from_here
from ssmkernels.ops.linear_attention.reference import scale_of
from ssmkernels.ops.ssd.tiled import segment_sums


class Chunk(NamedTuple):
    """One chunk: q, scaled, and k (b h c k), v (b h c v), g (b h c 1|k); bonus (h 1 k) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    bonus: Tensor | None


class Weighed:
    """A chunk's decays, and what its tokens see of each other: the letters of the module's docstring."""

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        q, k, _, g, bonus = chunk
        sums, start = segment_sums(g.mT), g.cumsum(-2)  # (b h 1|k i j), (b h c 1|k)
        self.end = torch.exp(sums[..., -1, :].mT)  # F_j
        self.whole = torch.exp(start[..., -1:, :].mT)  # E_c (b h 1|k 1)
        if bonus is not None:  # a query comes one decay earlier
            sums = F.pad(sums[..., :-1, :], (0, 0, 1, 0), value=-torch.inf)
            start = F.pad(start[..., :-1, :], (0, 0, 1, 0))
        self.E, self.start = torch.exp(sums), torch.exp(start)
        self.P = self.pairs(q, k)
        if bonus is not None:
            self.P = self.P + torch.diag_embed((q * bonus * k).sum(-1))

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ x_i y_j E_ij over key channels, (b h i j)."""
        if self.E.shape[2] == 1:
            return (x @ y.mT) * self.E[:, :, 0]
        return torch.einsum("bhik,bhjk,bhkij->bhij", x, y, self.E)

    def with_earlier(self, weights: Tensor, x: Tensor) -> Tensor:
        """Σ_j weights_ij E_ij ∘ x_j."""
        if self.E.shape[2] == 1:
            return (weights * self.E[:, :, 0]) @ x
        return torch.einsum("bhij,bhkij,bhjk->bhik", weights, self.E, x)

    def with_later(self, weights: Tensor, x: Tensor) -> Tensor:
        """Σ_i weights_ij E_ij ∘ x_i."""
        if self.E.shape[2] == 1:
            return (weights * self.E[:, :, 0]).mT @ x
        return torch.einsum("bhij,bhkij,bhik->bhjk", weights, self.E, x)

    def output(self, S: Tensor) -> Tensor:
        return self.P @ self.chunk.v + (self.start * self.chunk.q) @ S

    def after(self, S: Tensor) -> Tensor:
        """S'."""
        return self.whole * S + (self.end * self.chunk.k).mT @ self.chunk.v

    def backward(self, S: Tensor, dO: Tensor, dS: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """The gradients of q, k, v and g; that of S, from those of the output and of S'; that of the bonus."""
        q, k, v, g, bonus = self.chunk
        dP = (dO @ v.mT).tril()
        of_query, of_key = self.start * (dO @ S.mT), self.end * (v @ dS.mT)
        dq, dk = of_query + self.with_earlier(dP, k), of_key + self.with_later(dP, q)
        dv = self.P.mT @ dO + (self.end * k) @ dS
        dbonus = None
        if bonus is not None:
            own = dP.diagonal(dim1=-2, dim2=-1)[..., None]  # what tokens see of themselves
            dq, dk = dq + own * bonus * k, dk + own * bonus * q
            dbonus = (own * q * k).sum((0, 2))
        taken = q * of_query
        later = from_here(taken) if bonus is None else from_here(taken) - taken
        dg = later + before(k * of_key) + (self.whole * S * dS).sum(-1)[:, :, None]
        dg = self._of_decays(dP) + (dg.sum(-1, keepdim=True) if g.shape[-1] == 1 else dg)
        return (dq, dk, dv, dg), self.whole * dS + (self.start * q).mT @ dO, dbonus

    def _of_decays(self, dP: Tensor) -> Tensor:
        """For each t the sum over pairs of tokens around it of what passes from one to the other, (b h t 1|k)."""
        q, k = self.chunk.q, self.chunk.k
        if self.E.shape[2] == 1:
            T = (dP * self.P.tril(-1))[:, :, None]
        else:
            T = self.E * dP[:, :, None] * q.mT[..., None] * k.mT[:, :, :, None, :]
        T = T.tril(-1).cumsum(-1).flip(-2).cumsum(-2).flip(-2)  # (b h 1|k i j), over j' ≤ j and i' ≥ i
        if self.chunk.bonus is None:
            return F.pad(T.diagonal(-1, -2, -1), (1, 0)).mT
        # The later token is one further on, as it reads before its decay
        return F.pad(T.diagonal(-2, -2, -1), (1, 1))[..., : q.shape[-2]].mT


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    layout = Layout(a)
    S, outputs = layout.initial(), []
    for chunk in chunks(a, layout):
        weighed = Weighed(chunk)
        outputs.append(weighed.output(S))
        S = weighed.after(S)
    return layout.joined(outputs, a.v).to(a.q.dtype), S


def chunks(a: Any, layout: Layout) -> list[Chunk]:
    heads, wide = a.v.shape[2], precision(a.q)
    shape = (*a.v.shape[:3], 1)
    if a.log_decay is None:
        g = a.v.new_zeros(shape, dtype=wide)
    elif a.log_decay.ndim == 4:
        g = a.log_decay
    else:
        g = a.log_decay.expand(shape[:3])[..., None]
    q, k = (layout.cut(x).repeat_interleave(heads // x.shape[2], dim=2) for x in (a.q, a.k))
    bonus = None if a.bonus is None else a.bonus.to(wide)[:, None]
    parts = zip(scale_of(a.scale, a.k) * q, k, layout.cut(a.v), layout.cut(g), strict=True)
    return [Chunk(*part, bonus) for part in parts]


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor | None]:
    layout = Layout(a)
    S, every, states = layout.initial(), chunks(a, layout), []
    for chunk in every:
        states.append(S)
        S = Weighed(chunk).after(S)
    dS = torch.zeros_like(S) if grads.final_state is None else grads.final_state.clone()
    found, dbonus = [], None if a.bonus is None else S.new_zeros(a.bonus.shape)
    for chunk, S, dO in reversed(list(zip(every, states, layout.cut(grads.o), strict=True))):
        parts, dS, own = Weighed(chunk).backward(S, dO, dS)
        found.append(parts)
        if dbonus is not None and own is not None:
            dbonus += own
    of_q, of_k, of_v, of_g = [list(part) for part in zip(*reversed(found), strict=True)] or [[]] * 4
    dg = None
    if a.log_decay is not None:
        dg = layout.joined(of_g, a.log_decay if a.log_decay.ndim == 4 else a.v[..., :1])
        dg = dg.sum((0, 1)).view(-1) if a.log_decay.ndim == 1 else dg.view(a.log_decay.shape)
    return {
        "q": scale_of(a.scale, a.k) * layout.summed(of_q, a.q),
        "k": layout.summed(of_k, a.k),
        "v": layout.joined(of_v, a.v),
        "log_decay": dg,
        "bonus": dbonus,
        "initial_state": None if a.initial_state is None else dS,
    }
