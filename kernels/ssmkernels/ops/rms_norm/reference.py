"""Root-mean-square normalisation as its definition reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import precision


def compute(a: Any) -> tuple[Tensor, Tensor]:
    """y and x + residual, which is empty without a residual."""
    x, gate, residual, wide = a.x, a.gate, a.residual, precision(a.x)
    summed = x.new_empty(0, dtype=wide) if residual is None else (x.to(residual.dtype) + residual).contiguous()
    y = (x if residual is None else summed).to(wide)
    if gate is not None and not a.norm_before_gate:
        y = y * F.silu(gate.to(wide))
    y = _normalised(y, a.eps, a.group_size or y.shape[-1]) * a.weight.to(wide)
    if gate is not None and a.norm_before_gate:
        y = y * F.silu(gate.to(wide))
    return y.to(x.dtype).contiguous(), summed


def _normalised(x: Tensor, eps: float, group_size: int) -> Tensor:
    groups = x.unflatten(-1, (x.shape[-1] // max(group_size, 1), group_size))
    return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
