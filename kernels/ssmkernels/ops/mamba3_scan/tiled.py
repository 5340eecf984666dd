"""Mamba-3's recurrence in chunks of matrix products, in PyTorch: rotations around the state-space dual of ``ssd``.

An input counts at its own step t with γ_t = λ_t Δ_t, and from step t + 1 on with μ_{t+1} = (1 - λ_{t+1}) Δ_{t+1} as
well. So with the state G_t as it is between the two halves of step t, for SISO::

    G_t = α_{t-1} G_{t-1} + (γ_{t-1} + μ_t) v_{t-1} k_{t-1}ᵀ
    y_t = α_t G_t q_t + γ_t (q_t · k_t) v_t                      and at last h = α G + γ v kᵀ

The first line is Mamba-2's recurrence, with keys and values one step late. A step with r inputs is r tokens of it, of
which the first alone decays; a query at one of them does not yet see the later ones, which are added.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from ssmkernels.core.packing import pad
from ssmkernels.core.validate import precision
from ssmkernels.ops.mamba3_scan.reference import biased, rotated, within_a_turn
from ssmkernels.ops.ssd.reference import finished
from ssmkernels.ops.ssd.tiled import CHUNK, chunked


def compute(a: Any) -> tuple[Tensor, ...]:
    wide = precision(a.x)
    names = ("x", "dt", "A", "B", "C", "trap", "angles")
    timed = [getattr(a, name).to(wide) for name in names]
    starts = [a.initial_state, a.initial_angle, a.initial_key, a.initial_value]
    zeros = (torch.zeros_like(empty) for empty in a.declared.outputs(a)[1:])
    states = [zero if start is None else start for start, zero in zip(starts, zeros, strict=True)]
    if a.cu_seqlens is None:
        y, *states = _steps(a, timed, states, None)
    else:
        index, mask = pad(a.cu_seqlens)

        def padded(t: Tensor) -> Tensor:
            return torch.where(mask.view(*mask.shape, *[1] * (t.ndim - 2)), t[0, index], 0)

        # Where Δ is 0, the state and the angle stay as they are
        y, *states = _steps(a, [padded(t) for t in timed], states, mask.sum(1))
        y = y[mask][None]
    return finished(y, timed[0], a.D, a.z).to(a.x.dtype), *states


def _steps(a: Any, timed: list[Tensor], states: list[Tensor], lengths: Tensor | None) -> tuple[Tensor, ...]:
    """y (b l r h p) before skip and gate; h, θ, k and v after the last step, which each sequence may have elsewhere."""
    v, dt, A, B, C, trap, angles = timed
    h, theta, first_k, first_v = states
    length, rank, heads = v.shape[1:4]
    thetas = within_a_turn(theta[:, None] + (dt[..., None] * angles[:, :, None]).cumsum(1))  # (b l h a)
    k, q = (
        rotated(biased(t, bias, heads), thetas[:, :, None], a.interleaved) for t, bias in ((B, a.B_bias), (C, a.C_bias))
    )

    def after(first: Tensor, t: Tensor) -> Tensor:
        """The first, then all of t: at each place what was there a step earlier, and one more."""
        return torch.cat([first[:, None], t], dim=1)

    def late(t: Tensor) -> Tensor:
        """At each step what t (b l h) was a step earlier, 0 before the first."""
        return after(torch.zeros_like(t[:, :1].sum(1)), t)[:, :length]

    all_k, all_v, all_thetas = after(first_k, k), after(first_v, v), after(theta, thetas)
    k_late, v_late = all_k[:, :length], all_v[:, :length]
    decay, gamma, mu = dt * A, trap * dt, (1 - trap) * dt  # (b l h)
    scale = late(gamma) + mu

    def as_tokens(t: Tensor) -> Tensor:
        return rearrange(t, "b l r ... -> b (l r) ...")

    X = as_tokens(scale[:, :, None, :, None] * v_late)
    decays = torch.zeros_like(v[..., 0])  # (b l r h)
    decays[:, :, 0] = late(decay)
    size = a.chunk_size or CHUNK
    y, G = chunked(X, as_tokens(decays), as_tokens(k_late), as_tokens(q), h, size)
    y = rearrange(y, "b (l r) h p -> b l r h p", r=rank)
    unseen = torch.ones(rank, rank, dtype=torch.bool, device=v.device).triu(1)  # (query, key)
    seen_late = einsum(q, k_late, "b l r h n, b l j h n -> b l h r j").masked_fill(~unseen, 0)
    y = y + scale[:, :, None, :, None] * einsum(seen_late, v_late, "b l h r j, b l j h p -> b l r h p")
    alpha = torch.exp(decay)
    own = einsum(einsum(q, k, "b l r h n, b l j h n -> b l h r j"), v, "b l h r j, b l j h p -> b l r h p")
    y = alpha[:, :, None, :, None] * y + gamma[:, :, None, :, None] * own
    if length:
        outer = einsum(v[:, -1], k[:, -1], "b r h p, b r h n -> b h p n")
        h = alpha[:, -1, :, None, None] * G + gamma[:, -1, :, None, None] * outer
    if lengths is None:
        return y, h, all_thetas[:, -1], all_k[:, -1], all_v[:, -1]
    row = torch.arange(len(lengths), device=v.device)
    return y, h, *(t[row, lengths] for t in (all_thetas, all_k, all_v))
