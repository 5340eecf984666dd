"""Initialisations that several mixers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide_dtype() -> torch.dtype:
    """The dtype in which weights that stay float32 are created: float32, or float64 where that is the default."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def log_uniform(size: int, low: float, high: float) -> Tensor:
    """``(size)`` of :func:`wide_dtype`, log-uniform in [low, high]."""
    return torch.exp(torch.rand(size, dtype=wide_dtype()) * (math.log(high) - math.log(low)) + math.log(low))


def inverse_softplus_of_log_uniform(size: int, low: float, high: float, floor: float) -> Tensor:
    """``(size)`` of :func:`wide_dtype`: Mamba's bias of Δ.

    Its softplus is log-uniform in [low, high], and at least ``floor``.
    """
    dt = log_uniform(size, low, high).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
