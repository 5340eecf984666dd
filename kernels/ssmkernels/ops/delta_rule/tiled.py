"""The gated delta rule in chunks of matrix products, in PyTorch, forward and backward.

Within a chunk of c tokens, with the state S that comes in, g the log decays, and for each key channel::

    E_ij = exp(g_{j+1} + … + g_i)  for i ≥ j, else 0         the decay from token j to token i
    E_i  = exp(g_1 + … + g_i)                                that from the chunk's start to token i
    F_j  = exp(g_{j+1} + … + g_c), the last row of E_ij      that from token j to the chunk's end

each token writes k_i u_iᵀ into the state, where u_i = β_i (v_i - what the state holds for k_i by then). What it holds
is made of S and of the u_j written before, which is a unit triangular system for the rows of U (the WY form of a
product of Householder-like matrices; Yang et al. 2024, arXiv 2406.06484, section 3)::

    M_ij = β_i Σ k_i k_j E_ij  for i > j, else 0             sums over key channels
    (I + M) U = β (V - (E ∘ K) S)                            solved for the errors e_i = u_i / β_i
    P_ij = scale Σ q_i k_j E_ij
    O  = scale (E ∘ Q) S + P U
    S' = E_c S + (F ∘ K)ᵀ U

The backward pass goes through the chunks from the last to the first, with dS' the gradient of the state after one::

    dU = Pᵀ dO + (F ∘ K) dS'                                 (I + M)ᵀ X = dU
    dP = scale tril(dO Uᵀ)                                   N = -β tril(X Uᵀ, -1), the gradient of M times β
    dQ_i = scale E_i ∘ S dO_i + Σ_j dP_ij E_ij ∘ k_j
    dK_i = -β_i E_i ∘ S X_i + Σ_j N_ij E_ij ∘ k_j            as the later token of a pair,
    dK_j += F_j ∘ dS' u_j + Σ_i E_ij ∘ (dP_ij q_i + N_ij k_i)    and as the earlier one
    dV = β X                 dβ_i = X_i · e_i
    dS = E_c dS' + scale (E ∘ Q)ᵀ dO - (β E ∘ K)ᵀ X

The gradient of g_t is the sum over all that decays at t: of pairs i ≥ t > j, of what later tokens take from S, of what
earlier ones leave in S', and of S itself. Nothing is divided by a decay, and no sum is the difference of two others.

Only the states between chunks are kept, and these only during the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssmkernels.core.packing import pad
from ssmkernels.core.validate import precision
from ssmkernels.ops.delta_rule.reference import scale_of
from ssmkernels.ops.ssd.tiled import segment_sums

CHUNK = 64
CHUNK_OF_CHANNELS = 16  # with a decay per key channel, as E_ij is (c, c, k) then


class Chunk(NamedTuple):
    """One chunk: q, k (b h c k), v (b h c v), beta (b h c 1), g (b h c 1|k)."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor


class Layout:
    """A call's tokens as chunks of sequences of one length, and back.

    Args:
        a: the call.
        size: tokens of a chunk; as many as the delta rule's if None.
    """

    def __init__(self, a: Any, size: int | None = None):
        self.a, self.wide = a, precision(a.q)
        self.packing = None if a.cu_seqlens is None else pad(a.cu_seqlens)
        length = a.q.shape[1] if self.packing is None else self.packing[0].shape[1]
        if size is None:
            size = CHUNK_OF_CHANNELS if a.log_decay is not None and a.log_decay.ndim == 4 else CHUNK
        self.length, self.size = length, min(size, max(length, 1))

    def cut(self, x: Tensor, blank: float = 0.0) -> Tensor:
        """x (b l h d) → (n b h c d); where there is no token, it is ``blank``."""
        if self.packing is not None:
            index, mask = self.packing
            x = torch.where(mask[..., None, None], x[0, index], blank)
        x = F.pad(x.to(self.wide), (0, 0, 0, 0, 0, -self.length % self.size), value=blank)
        return rearrange(x, "b (n c) h d -> n b h c d", c=self.size)

    def chunks(self) -> list[Chunk]:
        a = self.a
        heads = a.v.shape[2] // a.q.shape[2]
        g = torch.zeros_like(a.beta) if a.log_decay is None else a.log_decay
        q, k = (self.cut(x).repeat_interleave(heads, dim=2) for x in (a.q, a.k))
        beta, g = (self.cut(x if x.ndim == 4 else x[..., None]) for x in (a.beta, g))
        return [Chunk(*parts) for parts in zip(q, k, self.cut(a.v), beta, g, strict=True)]

    def joined(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Chunks (b h c d) → (b l h d)."""
        if not parts:
            return like.new_zeros(like.shape, dtype=self.wide)
        x = rearrange(torch.stack(parts), "n b h c d -> b (n c) h d")[:, : self.length]
        return (x if self.packing is None else x[self.packing[1]][None]).contiguous()

    def summed(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Chunks (b h c d) → (b l g d): the sum over the heads of each group."""
        groups = [rearrange(x, "b (g r) c d -> b g r c d", g=like.shape[2]).sum(2) for x in parts]
        return self.joined(groups, like)

    def initial(self) -> Tensor:
        a = self.a
        s = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        if a.initial_state is not None:
            return a.initial_state.clone()
        return a.v.new_zeros(s, a.v.shape[2], a.q.shape[3], a.v.shape[3], dtype=self.wide)


class Solved:
    """A chunk's matrices, and what its tokens write: the letters of the module's docstring."""

    def __init__(self, chunk: Chunk, S: Tensor, scale: float):
        self.chunk, self.S, self.scale = chunk, S, scale
        q, k, v, beta, g = chunk
        self.E = torch.exp(segment_sums(g.mT))  # (b h 1|k i j)
        self.start = torch.exp(g.cumsum(-2))  # E_i (b h c 1|k)
        self.end = self.E[..., -1, :].mT  # F_j
        self.whole = self.start[..., -1:, :].mT  # E_c (b h 1|k 1)
        keys = self.pairs(k, k).tril(-1)
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
        self.M = eye + beta * keys
        self.P = scale * self.pairs(q, k)
        read = v - (self.start * k) @ S
        self.error = torch.linalg.solve_triangular(eye + keys * beta.mT, read, upper=False, unitriangular=True)
        self.U = beta * self.error

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ x_i y_j E_ij over key channels, (b h i j)."""
        if self.E.shape[2] == 1:
            return (x @ y.mT) * self.E[:, :, 0]
        return torch.einsum("bhik,bhjk,bhkij->bhij", x, y, self.E)

    def output(self) -> Tensor:
        return self.scale * (self.start * self.chunk.q) @ self.S + self.P @ self.U

    def after(self) -> Tensor:
        """S'."""
        return self.whole * self.S + (self.end * self.chunk.k).mT @ self.U

    def backward(self, dO: Tensor, dS: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The gradients of q, k, v, beta and g, and that of S, from those of the output and of S'."""
        q, k, _, beta, g = self.chunk
        dU = self.P.mT @ dO + (self.end * k) @ dS
        X = torch.linalg.solve_triangular(self.M.mT, dU, upper=True, unitriangular=True)
        dP = self.scale * (dO @ self.U.mT).tril()
        N = -beta * (X @ self.U.mT).tril(-1)
        of_q = self.scale * self.start * (dO @ self.S.mT)
        of_later = -beta * self.start * (X @ self.S.mT)
        of_earlier = self.end * (self.U @ dS.mT)
        dq = of_q + self._with_earlier(dP, k)
        dk = of_later + self._with_earlier(N, k) + of_earlier + self._with_later(dP, q) + self._with_later(N, k)
        dg = self._of_decays(dP, N) + from_here(q * of_q + k * of_later) + before(k * of_earlier)
        dg = dg + (self.whole * self.S * dS).sum(-1)[:, :, None]
        left = torch.cat([self.scale * self.start * q, -beta * self.start * k], dim=-2)
        of_state = self.whole * dS + left.mT @ torch.cat([dO, X], dim=-2)
        dg = dg.sum(-1, keepdim=True) if g.shape[-1] == 1 else dg
        return (dq, dk, beta * X, (X * self.error).sum(-1, keepdim=True), dg), of_state

    def _with_earlier(self, weights: Tensor, x: Tensor) -> Tensor:
        """Σ_j weights_ij E_ij ∘ x_j."""
        return torch.einsum("bhij,bhkij,bhjk->bhik", weights, self.E.expand(-1, -1, x.shape[-1], -1, -1), x)

    def _with_later(self, weights: Tensor, x: Tensor) -> Tensor:
        """Σ_i weights_ij E_ij ∘ x_i."""
        return torch.einsum("bhij,bhkij,bhik->bhjk", weights, self.E.expand(-1, -1, x.shape[-1], -1, -1), x)

    def _of_decays(self, dP: Tensor, N: Tensor) -> Tensor:
        """For each t the sum over pairs i ≥ t > j of what passes from j to i, (b h t k)."""
        q, k = self.chunk.q.mT[..., None], self.chunk.k.mT
        T = self.E * (dP[:, :, None] * q + N[:, :, None] * k[..., None]) * k[:, :, :, None, :]  # (b h k i j)
        T = T.tril(-1).cumsum(-1).flip(-2).cumsum(-2).flip(-2)  # over j' ≤ j and i' ≥ i
        return F.pad(T.diagonal(-1, -2, -1), (1, 0)).mT


def from_here(x: Tensor) -> Tensor:
    """Sums over i ≥ t of x (b h i k)."""
    return x.flip(-2).cumsum(-2).flip(-2)


def before(x: Tensor) -> Tensor:
    """Sums over j < t of x (b h j k)."""
    return F.pad(x.cumsum(-2)[..., :-1, :], (0, 0, 1, 0))


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    layout, scale = Layout(a), scale_of(a.scale, a.q.shape[3])
    S, outputs = layout.initial(), []
    for chunk in layout.chunks():
        solved = Solved(chunk, S, scale)
        outputs.append(solved.output())
        S = solved.after()
    return layout.joined(outputs, a.v).to(a.q.dtype), S


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor | None]:
    layout, scale = Layout(a), scale_of(a.scale, a.q.shape[3])
    S, chunks, states = layout.initial(), layout.chunks(), []
    for chunk in chunks:
        states.append(S)
        S = Solved(chunk, S, scale).after()
    dS = torch.zeros_like(S) if grads.final_state is None else grads.final_state.clone()
    found = []
    for chunk, S, dO in reversed(list(zip(chunks, states, layout.cut(grads.o), strict=True))):
        parts, dS = Solved(chunk, S, scale).backward(dO, dS)
        found.append(parts)
    every = [list(part) for part in zip(*reversed(found), strict=True)] or [[]] * 5
    dq, dk = (layout.summed(parts, x) for parts, x in zip(every[:2], (a.q, a.k), strict=True))
    dv, dbeta = layout.joined(every[2], a.v), layout.joined(every[3], a.beta[..., None])[..., 0]
    dg = None
    if a.log_decay is not None:
        dg = layout.joined(every[4], a.log_decay if a.log_decay.ndim == 4 else a.log_decay[..., None])
        dg = dg.view(a.log_decay.shape)
    initial = None if a.initial_state is None else dS
    return {"q": dq, "k": dk, "v": dv, "beta": dbeta, "log_decay": dg, "initial_state": initial}
