"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2), in rotate-half form.

Channels i and i + dim/2 of a head are a pair, turned by the angle position · base^(-2i/dim), as in Llama.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, ``(b, l, 1, dim / 2)``.

    Args:
        positions: integers, ``(b, l)``, or ``(1, l)`` for all alike.
        dim: how many channels of a head turn; even.
        base: the longest wavelength is about 2π · base positions.
        dtype: float32 or float64: half precision cannot tell far positions apart.
    """
    frequency = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)  # (dim/2)
    angle = (positions[..., None] * frequency)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the leading channels of each head of x ``(b, l, h, k)``; the rest stays."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
