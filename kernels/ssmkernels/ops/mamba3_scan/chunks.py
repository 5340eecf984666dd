"""Mamba-3's recurrence as rotations around the state-space dual of ``ssd``, which runs in chunks of matrix products.

An input counts at its own step t with γ_t = λ_t Δ_t, and from step t + 1 on with μ_{t+1} = (1 - λ_{t+1}) Δ_{t+1} as
well. So with the state G_t as it is between the two halves of step t, for SISO::

    G_t = α_{t-1} G_{t-1} + (γ_{t-1} + μ_t) v_{t-1} k_{t-1}ᵀ
    y_t = α_t G_t q_t + γ_t (q_t · k_t) v_t                      and at last h = α G + γ v kᵀ

The first line is Mamba-2's recurrence, with keys and values one step late. A step with r inputs is r tokens of it, of
which the first alone decays; a query at one of them does not yet see the later ones, which are added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.linear_recurrence import linear_recurrence
from ssmkernels.ops.mamba3_scan.reference import biased, rotated, within_a_turn
from ssmkernels.ops.ssd.reference import finished

# X (b l h p), log decays (b l h), B, C (b l h n), the first state (s h p n), chunk size, borders → Y, the last state
Dual = Callable[..., tuple[Tensor, Tensor]]


class Sequences:
    """The steps before and at the ends of a batch's sequences, packed or not. Reads no borders on the host."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None):
        self.length, self.borders = x.shape[1], cu_seqlens
        if cu_seqlens is not None:
            self.empty = cu_seqlens.diff() == 0
            starts = cu_seqlens[:-1].long()
            self.starts = torch.where(self.empty, self.length, starts)  # of those that are empty, behind the last step
            self.ends = (cu_seqlens[1:].long() - 1).clamp(min=0)

    def late(self, first: Tensor, t: Tensor) -> Tensor:
        """At each step what t (b l …) was a step earlier, and what ``first`` (s …) says at the first."""
        if self.borders is None:
            return torch.cat([first[:, None], t], dim=1)[:, : self.length]
        before = torch.cat([t.new_zeros(1, 1, *t.shape[2:]), t], dim=1)
        return before.index_copy(1, self.starts, first[None])[:, : self.length]

    def last(self, first: Tensor, t: Tensor) -> Tensor:
        """t (b l …) at the last step of each sequence, (s …), and ``first`` where there is none."""
        if self.length == 0:
            return first
        if self.borders is None:
            return t[:, -1]
        return torch.where(self.empty.view(-1, *[1] * (first.ndim - 1)), first, t[0, self.ends])

    def summed(self, first: Tensor, t: Tensor) -> Tensor:
        """``first`` (s h a) and all of t (b l h a) up to each step, in float64, as sums of angles grow large."""
        one = t.new_ones(t.shape[2] * t.shape[3], dtype=torch.float64)
        start, borders = first.double().flatten(1), self.borders
        sums = linear_recurrence(one, t.double().flatten(2), initial_state=start, cu_seqlens=borders)
        return cast(Tensor, sums).unflatten(2, t.shape[2:])


def in_chunks(a: Any, dual: Dual) -> tuple[Tensor, ...]:
    """The op's results by some implementation of the dual."""
    wide = precision(a.x)
    v, dt, A, B, C, trap, angles = (getattr(a, n).to(wide) for n in ("x", "dt", "A", "B", "C", "trap", "angles"))
    starts = [a.initial_state, a.initial_angle, a.initial_key, a.initial_value]
    zeros = (torch.zeros_like(empty) for empty in a.declared.outputs(a)[1:])
    h, theta, first_k, first_v = (zero if start is None else start for start, zero in zip(starts, zeros, strict=True))
    rank, heads = v.shape[2:4]
    sequences = Sequences(v, a.cu_seqlens)
    thetas = within_a_turn(sequences.summed(theta, dt[..., None] * angles[:, :, None])).to(wide)  # (b l h a)
    k, q = (
        rotated(biased(t, bias, heads), thetas[:, :, None], a.interleaved) for t, bias in ((B, a.B_bias), (C, a.C_bias))
    )
    decay, gamma, mu = dt * A, trap * dt, (1 - trap) * dt  # (b l h)
    none = h.new_zeros(h.shape[:2])
    k_late, v_late = sequences.late(first_k, k), sequences.late(first_v, v)
    scale = sequences.late(none, gamma) + mu

    def as_tokens(t: Tensor) -> Tensor:
        return rearrange(t, "b l r ... -> b (l r) ...")

    X = as_tokens(scale[:, :, None, :, None] * v_late)
    decays = torch.zeros_like(v[..., 0])  # (b l r h)
    decays[:, :, 0] = sequences.late(none, decay)
    borders = None if a.cu_seqlens is None else a.cu_seqlens * rank
    y, G = dual(X, as_tokens(decays), as_tokens(k_late), as_tokens(q), h, a.chunk_size, borders)
    y = rearrange(y, "b (l r) h p -> b l r h p", r=rank)
    if rank > 1:
        unseen = torch.ones(rank, rank, dtype=torch.bool, device=v.device).triu(1)  # (query, key)
        seen_late = einsum(q, k_late, "b l r h n, b l j h n -> b l h r j").masked_fill(~unseen, 0)
        y = y + scale[:, :, None, :, None] * einsum(seen_late, v_late, "b l h r j, b l j h p -> b l r h p")
    own = einsum(einsum(q, k, "b l r h n, b l j h n -> b l h r j"), v, "b l h r j, b l j h p -> b l r h p")
    y = torch.exp(decay)[:, :, None, :, None] * y + gamma[:, :, None, :, None] * own
    last_k, last_v = sequences.last(first_k, k), sequences.last(first_v, v)
    last_alpha, last_gamma = sequences.last(none + 1, torch.exp(decay)), sequences.last(none, gamma)
    outer = einsum(last_v, last_k, "s r h p, s r h n -> s h p n")
    h = last_alpha[..., None, None] * G + last_gamma[..., None, None] * outer
    return finished(y, v, a.D, a.z).to(a.x.dtype), h, sequences.last(theta, thetas), last_k, last_v
