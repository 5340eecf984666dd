"""Exponentials of learned logarithms that never overflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def finite_exp(x: Tensor) -> Tensor:
    """e^x of any shape and floating dtype, with x cut off where e^x would overflow: at 88 in float32, 709 in float64.

    For rates of decay. Had one overflowed, its log decays would be -∞, or NaN for a step of 0, and their gradients
    0 · ∞. In exact arithmetic so fast a decay is 0, and nothing passes through it: that is the gradient beyond the
    limit.
    """
    return torch.exp(x.clamp(max=math.floor(math.log(torch.finfo(x.dtype).max))))
