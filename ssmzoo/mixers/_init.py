"""Initialisations that several mixers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_uniform(size: int, low: float, high: float) -> Tensor:
    """``(size)`` float32, log-uniform in [low, high]."""
    return torch.exp(torch.rand(size) * (math.log(high) - math.log(low)) + math.log(low))


def inverse_softplus_of_log_uniform(size: int, low: float, high: float, floor: float) -> Tensor:
    """``(size)`` float32 whose softplus is log-uniform in [low, high], no less than ``floor`` (Mamba's bias of Δ)."""
    dt = log_uniform(size, low, high).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
