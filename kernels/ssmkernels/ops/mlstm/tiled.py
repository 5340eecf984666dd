"""xLSTM's matrix memory in chunks of matrix products, in PyTorch, forward and backward.

Within a chunk of c tokens, with a = log σ(f), the state (C, n, m) that comes in, and the stabiliser of the recurrence::

    D_tj = a_{j+1} + … + a_t + i_j   for t ≥ j, else -∞      how much of token j is left at token t, a logarithm
    e_t  = a_1 + … + a_t + m                                 how much of the state
    m_t  = max(e_t, max_j D_tj)
    P    = exp(D - m_t) ∘ scale Q Kᵀ,   Q̃ = scale exp(e - m_t) ∘ Q
    N    = P V + Q̃ C,   s = P 1 + Q̃ n,   b = max(|s|, exp(-m_t)) + ε,   Y = N / b
    C'   = exp(e_c - m_c) C + (F ∘ K)ᵀ V,   n' alike with 1 in the place of V,   F_j = exp(D_cj - m_c)

m_t is what the recurrence has at token t, so that ε counts as much here as there. Sums of a are never differences of
two longer sums.

The backward pass goes through the chunks from the last to the first, with dC' and dn' the gradients of the state after
one. m is a constant in what follows, except for dm, which is what it gets in b and as a part of the state::

    dN = dY / b,   db = -Σ dN ∘ Y,   ds = ± db where |s| counts in b, else 0;   dm = -exp(-m) db where that counts
    dP = tril(dN Vᵀ + ds 1ᵀ),   dV = Pᵀ dN + (F ∘ K) dC'
    dQ = scale (dP ∘ exp(D - m_t)) K + scale exp(e - m_t) ∘ (dN Cᵀ + ds nᵀ)
    dK = scale (dP ∘ exp(D - m_t))ᵀ Q + F ∘ (V dC'ᵀ + 1 dn')
    dD = dP ∘ P
    dC = exp(e_c - m_c) dC' + Q̃ᵀ dN,   dn alike with ds in the place of dN

The gradient of a_t as if m were a constant, D_t, is the sum over all that decays at t: of pairs on both sides of it, of
what later tokens take from the state, of what earlier ones leave in C' and n', and of the state itself. That of i_t is
W_t, the sum of dD over its column and F_t k_t · (dC' v_t + dn'). As m_t is the larger of a_t + m_{t-1} and i_t, that
one also gets what m does, M_t - D_t - W_t, where M_t is dm_t and what m_t gets as a part of a_{t+1} + m_t::

    d(a_t + m_{t-1}) = M_t - W_t,   di_t = W_t         where a_t + m_{t-1} is the larger
    d(a_t + m_{t-1}) = D_t,         di_t = M_t - D_t   where i_t is

Many of these sums cancel but for rounding, as y does not depend on gates that are far above all others; so none of the
three is added where it does not have to be. Only the states between chunks are kept, and these only during the backward
pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.ops.delta_rule.tiled import Layout, before, from_here
from ssmkernels.ops.mlstm.reference import denominator, log_sigmoid, scale_of
from ssmkernels.ops.mlstm.surroundings import counted, of_floor
from ssmkernels.ops.ssd.tiled import segment_sums

CHUNK = 64  # tokens


class Chunk(NamedTuple):
    """q, scaled, and k (b h c k), v (b h c v), i and a (b h c 1)."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    a: Tensor


class State(NamedTuple):
    """C (b h k v), n (b h k) and m (b h)."""

    C: Tensor
    n: Tensor
    m: Tensor


class Weighed:
    """A chunk after a state: the letters of the module's docstring."""

    def __init__(self, chunk: Chunk, state: State):
        self.chunk, self.state = chunk, state
        q, k, _, i, a = chunk
        D = segment_sums(a[..., 0]) + i.mT  # (b h t j)
        e = a.cumsum(-2) + state.m[..., None, None]  # (b h t 1)
        self.m = torch.maximum(e, D.amax(-1, keepdim=True))
        self.weights, self.carried = torch.exp(D - self.m), torch.exp(e - self.m)
        self.P, self.from_state = self.weights * (q @ k.mT), self.carried * q
        self.left = self.weights[..., -1, :, None]  # F_j (b h c 1)
        self.whole = self.carried[..., -1, :]  # exp(e_c - m_c) (b h 1)

    def output(self) -> tuple[Tensor, Tensor, Tensor]:
        """Y (b h c v), s and b (b h c 1)."""
        sums = self.P.sum(-1, keepdim=True) + self.from_state @ self.state.n[..., None]
        below = denominator(sums, self.m)
        return (self.P @ self.chunk.v + self.from_state @ self.state.C) / below, sums, below

    def after(self) -> State:
        fed, (C, n, _) = self.left * self.chunk.k, self.state
        C = self.whole[..., None] * C + fed.mT @ self.chunk.v
        return State(C, self.whole * n + fed.sum(-2), self.m[..., -1, 0].contiguous())

    def backward(self, dy: Tensor, after: State) -> tuple[Chunk, State]:
        """The gradients of the chunk and of the state before it, from those of Y and of the state after it."""
        (q, k, v, _, _), (C, n, _) = self.chunk, self.state
        y, sums, below = self.output()
        dN = dy / below
        of_sums = counted(sums, torch.exp(-self.m))
        dsums = -(dN * y).sum(-1, keepdim=True) * of_sums * sums.sign()
        dm = (dy * y).sum(-1, keepdim=True) * (1 - of_sums) * of_floor(self.m)
        dP = (dN @ v.mT + dsums).tril()
        products = dP * self.weights
        of_query = self.carried * (dN @ C.mT + dsums * n[..., None, :])
        of_key = self.left * (v @ after.C.mT + after.n[..., None, :])
        dD, of_state = dP * self.P, self.whole * ((C * after.C).sum((-2, -1)) + (n * after.n).sum(-1))[..., None]
        kept = (k * of_key).sum(-1, keepdim=True)
        da = from_here((q * of_query).sum(-1, keepdim=True)) + before(kept) + of_state[..., None] + _across(dD)
        di = dD.sum(-2)[..., None] + kept
        da, di, dm = self._of_gates(da, di, dm, after.m)
        gradients = Chunk(
            products @ k + of_query,
            products.mT @ q + of_key,
            self.P.mT @ dN + (self.left * k) @ after.C,
            di,
            da,
        )
        dC = self.whole[..., None] * after.C + self.from_state.mT @ dN
        return gradients, State(dC, self.whole * after.n + (self.from_state * dsums).sum(-2), dm)

    def _of_gates(self, D: Tensor, W: Tensor, dm: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of a, i and the m before the chunk, from D, W, dm (b h c 1) and what m gets after it (b h)."""
        kept = self.chunk.a + torch.cat([self.state.m[..., None, None], self.m[..., :-1, :]], dim=-2)
        share = torch.where(kept == self.chunk.i, 0.5, (kept > self.chunk.i).to(kept.dtype))
        passed = torch.exp(segment_sums(torch.log(share[..., 0])))  # from m_t to m_j, (b h t j)
        own = (1 - share) * D - share * W  # of a_t + m_{t-1} beside a share of M_t
        M = passed.mT @ (dm + torch.cat([own[..., 1:, :], last[..., None, None]], dim=-2))
        dkept = own + share * M
        return dkept, share * W + (1 - share) * (M - D), dkept[..., 0, 0].contiguous()


def _across(dD: Tensor) -> Tensor:
    """Σ over pairs j < t ≤ t' of dD_t'j, (b h t 1), each sum over its own terms."""
    sums = dD.tril(-1).cumsum(-1).flip(-2).cumsum(-2).flip(-2)
    return F.pad(sums.diagonal(-1, -2, -1), (1, 0))[..., None]


def forward(a: Any, _: bool) -> tuple[Tensor, ...]:
    layout = Layout(a, CHUNK)
    state, outputs = _initial(a), []
    for chunk in _chunks(a, layout):
        weighed = Weighed(chunk, state)
        outputs.append(weighed.output()[0])
        state = weighed.after()
    return layout.joined(outputs, a.v).to(a.q.dtype), *state


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor | None]:
    layout = Layout(a, CHUNK)
    state, chunks, states = _initial(a), _chunks(a, layout), []
    for chunk in chunks:
        states.append(state)
        state = Weighed(chunk, state).after()
    given = (grads.final_C, grads.final_n, grads.final_m)
    dC, dn, dm = (torch.zeros_like(x) if g is None else g for x, g in zip(state, given, strict=True))
    gradient, found = State(dC, dn, dm), []
    for chunk, state, dy in reversed(list(zip(chunks, states, layout.cut(grads.y), strict=True))):
        parts, gradient = Weighed(chunk, state).backward(dy, gradient)
        found.append(parts)
    dq, dk, dv, di, da = [list(part) for part in zip(*reversed(found), strict=True)] or [[]] * 5
    dC, dn, dm = gradient
    return {
        "q": scale_of(a.scale, a.q) * layout.joined(dq, a.q),
        "k": layout.joined(dk, a.k),
        "v": layout.joined(dv, a.v),
        "i": layout.joined(di, a.i[..., None])[..., 0],
        "f": layout.joined(da, a.f[..., None])[..., 0] * torch.sigmoid(-a.f.to(dm.dtype)),
        "initial_C": None if a.initial_C is None else dC,
        "initial_n": None if a.initial_n is None else dn,
        "initial_m": None if a.initial_m is None else dm,
    }


def _initial(a: Any) -> State:
    zeros = (torch.zeros_like(empty) for empty in a.declared.outputs(a)[1:])
    given = (a.initial_C, a.initial_n, a.initial_m)
    return State(*(zero if start is None else start.clone() for start, zero in zip(given, zeros, strict=True)))


def _chunks(a: Any, layout: Layout) -> list[Chunk]:
    """Where there is no token, i is -∞ and a is 0: the state stays as it is."""
    decay = log_sigmoid(a.f.to(layout.wide))
    cuts = (layout.cut(a.q), layout.cut(a.k), layout.cut(a.v), layout.cut(a.i[..., None], -torch.inf))
    parts = zip(*cuts, layout.cut(decay[..., None]), strict=True)
    return [Chunk(scale_of(a.scale, a.q) * q, *rest) for q, *rest in parts]
