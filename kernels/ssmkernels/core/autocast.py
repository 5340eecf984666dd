"""Autocast: whether it is on, and tensors in another half precision than its own, which PyTorch's operators refuse."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import HALF


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a type of device; never where PyTorch has none for it, as for meta."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Within, autocast is off; nothing to switch off where PyTorch has none for a type of device, as for meta."""
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def widened(weight: Any, x: Any) -> Any:
    """A weight as it is, or in float32 where autocast put activations ``x`` in another half precision than it has."""
    if not isinstance(weight, Tensor) or weight.dtype not in HALF or not isinstance(x, Tensor):
        return weight
    other = x.dtype in HALF and x.dtype != weight.dtype
    return weight.float() if other and autocasts(x.device.type) else weight


def in_autocast(x: Tensor) -> Tensor:
    """Activations as they are, or in autocast's half precision where they have the other one."""
    if x.dtype not in HALF or not autocasts(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
