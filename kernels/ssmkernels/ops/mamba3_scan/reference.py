"""Mamba-3's recurrence, one step after another.

arXiv 2603.15569: the trapezoidal update with α = exp(ΔA), β = (1 - λ) Δ α and γ = λ Δ; a complex state as rotations of
B and C by angles that add up; several inputs and outputs a step.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from ssmkernels.core.recurrence import recurrence
from ssmkernels.core.validate import precision
from ssmkernels.ops.ssd.reference import finished


@recurrence
def compute(states, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, z, interleaved):
    """h (b h p n), θ (b h a), k (b r h n), v (b r h p), and of one step x, z (b r h p), dt, A, trap (b h), B, C
    (b r g n), angles (b a) → y (b r h p) and h, θ, k, v."""
    h, theta, last_k, last_v = states
    wide = precision(x)
    v, dt, A, trap, angles = (t.to(wide) for t in (x, dt, A, trap, angles))
    theta = within_a_turn(theta + dt[..., None] * angles[:, None])
    k, q = (
        rotated(biased(t.to(wide), bias, x.shape[2]), theta[:, None], interleaved)
        for t, bias in ((B, B_bias), (C, C_bias))
    )
    alpha, beta, gamma = torch.exp(dt * A), (1 - trap) * dt, trap * dt
    before = h + beta[..., None, None] * einsum(last_v, last_k, "b r h p, b r h n -> b h p n")
    h = alpha[..., None, None] * before + gamma[..., None, None] * einsum(v, k, "b r h p, b r h n -> b h p n")
    y = einsum(h, q, "b h p n, b r h n -> b r h p")
    return finished(y, v, D, z), (h, theta, k, v)


def biased(maps: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Maps (… r g n) of groups → (… r h n) of heads, with their bias (h r n)."""
    maps = repeat(maps, "... g n -> ... (g i) n", i=heads // maps.shape[-2])
    return maps if bias is None else maps + rearrange(bias.to(maps.dtype), "h r n -> r h n")


def rotated(maps: Tensor, theta: Tensor, interleaved: bool) -> Tensor:
    """Pairs of the dimensions of maps (… h n), turned by θ (… h a)."""
    count, n = theta.shape[-1], maps.shape[-1]
    first = torch.arange(count, device=maps.device) * (2 if interleaved else 1)
    second = first + (1 if interleaved else n // 2)
    one, other, cos, sin = maps[..., first], maps[..., second], torch.cos(theta), torch.sin(theta)
    return maps.index_copy(-1, first, one * cos - other * sin).index_copy(-1, second, one * sin + other * cos)


def within_a_turn(theta: Tensor) -> Tensor:
    """The same angle between -π and π."""
    return theta - 2 * math.pi * torch.round(theta.detach() / (2 * math.pi))
