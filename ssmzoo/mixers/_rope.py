"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2), in rotate-half form."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.validate import precision


def rope(x: Tensor, positions: Tensor, dim: int, base: float) -> Tensor:
    """Turns the first ``dim`` of each head's channels by angles that grow with the position.

    Channels i and i + dim/2 are a pair, turned by position · base^(-2i/dim). Angles and products are float32
    (float64 for float64 x).

    Args:
        x: ``(b, l, h, k)``; channels from ``dim`` on stay as they are.
        positions: integers, ``(b, l)`` or ``(1, l)``.
        dim: even, at most k.
        base: the longest wavelength is about 2π · base.
    """
    wide = precision(x)
    frequency = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=wide) / dim)  # (dim/2)
    angle = (positions[..., None] * frequency)[:, :, None]  # (b l 1 dim/2)
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split([dim // 2, dim // 2, x.shape[-1] - dim], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1)
