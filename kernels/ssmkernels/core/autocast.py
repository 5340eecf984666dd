"""Tensors in one half precision where autocast computes in the other, which PyTorch's operators there refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import HALF


def widened(weight: Any, x: Any) -> Any:
    """A weight as it is, or in float32 where autocast put activations ``x`` in another half precision than it has."""
    if not isinstance(weight, Tensor) or weight.dtype not in HALF or not isinstance(x, Tensor):
        return weight
    other = x.dtype in HALF and x.dtype != weight.dtype
    return weight.float() if other and torch.is_autocast_enabled(x.device.type) else weight


def in_autocast(x: Tensor) -> Tensor:
    """Activations as they are, or in autocast's half precision where they have the other one."""
    if x.dtype not in HALF or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
