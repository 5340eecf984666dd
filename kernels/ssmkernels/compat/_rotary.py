"""Rotation by position, as :mod:`ssmkernels.compat.flash_attn` has it."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.validate import precision


def turned(
    op: str, x: Tensor, cos: Tensor, sin: Tensor, place: Tensor, interleaved: bool, name: str = "rotary_cos"
) -> Tensor:
    """x (… h d) with its first channels turned by the angles of its places (…).

    Args:
        cos, sin: of each place, ``(positions, channels / 2)``.
        interleaved: whether neighbouring channels are turned together; otherwise half of them apart.
        name: of ``cos``, for messages.

    Raises:
        ValueError: there are more channels than x has, or fewer places.
    """
    half = cos.shape[1]
    if 2 * half > x.shape[-1] or (place.numel() and int(place.max()) >= len(cos)):
        needed = int(place.max()) + 1 if place.numel() else 0
        raise ValueError(
            f"{op}: `{name}` must be (positions, channels), at least {needed} by at most {x.shape[-1] // 2}; got "
            f"{tuple(cos.shape)}"
        )
    wide = precision(x)
    cos, sin = (t[place][..., None, :].to(wide) for t in (cos, sin))
    turning, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    one, two = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    parts = one * cos - two * sin, one * sin + two * cos
    turning = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turning.to(x.dtype), rest], -1)
