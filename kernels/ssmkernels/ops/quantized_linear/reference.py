"""A linear map with quantised weights as it is defined: dequantise, then multiply."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.quantized_linear import SPAN

LEAST = 2.0**-100  # scale of rounded inputs
MIDDLE = 8  # what 4-bit weights without zeros count from


def compute(a: Any) -> Tensor:
    """y."""
    wide = precision(a.x)
    weight = dequantized(a.weight, a.scales, a.zeros, a.group_size, a.x.shape[-1], wide)
    y = inputs(a) @ weight.T
    return (y if a.bias is None else y + a.bias).to(a.x.dtype)


def inputs(a: Any) -> Tensor:
    """x in the dtype of sums, rounded if it shall be; then its gradient is that of x as it came."""
    x = a.x.to(precision(a.x))
    if a.activations is None:
        return x
    size, span = x.shape[-1], min(a.group_size or SPAN, SPAN)
    parts = F.pad(x.detach().float(), (0, -size % span)).unflatten(-1, (-1, span))
    scale = (parts.abs().amax(-1, keepdim=True) / 127).clamp(min=LEAST)
    rounded = (parts / scale).round().to(x.dtype) * scale.to(x.dtype)
    return rounded.flatten(-2)[..., :size] + (x - x.detach())


def dequantized(
    weight: Tensor, scales: Tensor | None, zeros: Tensor | None, group_size: int | None, size: int, wide: torch.dtype
) -> Tensor:
    """W ``(o, size)``, in the given dtype."""
    if scales is None:
        return weight.to(wide)
    return whole_numbers(weight, zeros, group_size, size).to(wide) * spread(scales.to(wide), group_size, size)


def whole_numbers(weight: Tensor, zeros: Tensor | None, group_size: int | None, size: int) -> Tensor:
    """q less the zeros, ``(o, size)`` int8."""
    if weight.dtype == torch.int8:
        return weight
    q = unpacked(weight)[:, :size]
    return q - (MIDDLE if zeros is None else spread(zeros.to(torch.int8), group_size, size))


def unpacked(weight: Tensor) -> Tensor:
    """``(o, 16 n)`` uint8 → the 4-bit numbers ``(o, 32 n)`` int8."""
    halves = weight.unflatten(1, (-1, 16))
    return torch.cat([halves & 15, halves >> 4], dim=2).flatten(1).to(torch.int8)


def spread(of_groups: Tensor, group_size: int | None, size: int) -> Tensor:
    """``(o, g)`` → ``(o, size)``: each group's number for all of its inputs."""
    return of_groups.repeat_interleave(group_size or max(size, 1), dim=1)[:, :size]
