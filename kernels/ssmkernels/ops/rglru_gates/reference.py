"""The gates of the real-gated linear recurrent unit as they are defined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision

STEEPEST = 1000.0  # the derivative of the root is cut off here


def compute(a: Any) -> tuple[Tensor, Tensor]:
    """a and b."""
    wide = precision(a.x)
    recurrence, inputs = torch.sigmoid(a.gates.to(wide)).chunk(2, dim=-1)
    log_a = a.log_decay.to(wide) * recurrence
    root = capped_root(-torch.expm1(2 * log_a))
    if a.first is not None:
        root = torch.where((a.first != 0)[..., None, None], 1.0, root)
    return torch.exp(log_a), (root * inputs * a.x).to(a.x.dtype).contiguous()


def capped_root(x: Tensor) -> Tensor:
    """√x for x ≥ 0, with a derivative of at most ``STEEPEST``."""
    flat = (2 * STEEPEST) ** -2  # where the root's own derivative is as steep
    below = x.detach().sqrt() + STEEPEST * (x - x.detach())
    return torch.where(x < flat, below, x.clamp(min=flat).sqrt())
