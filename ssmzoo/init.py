"""How weights start.

PyTorch's own layers start as published for GPT-2, and for Mamba after it: biases of linear maps at 0, and each map that
writes into the residual stream divided by √residuals. Mixers draw their time steps here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssmzoo.mixer import Mixer
from ssmzoo.mlp import ChannelMixer


@torch.no_grad()
def initialise_mixer(mixer: Mixer, residuals: int) -> None:
    """Linear biases, but for those that the mixer sets and keeps in float32; and its residual projections."""
    for name, module in mixer.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.bias" not in mixer.float32_parameters:
            _zero(module.bias)
    for name in mixer.residual_projections:
        mixer.get_parameter(f"{name}.weight").div_(residuals**0.5)


@torch.no_grad()
def initialise_mlp(mlp: ChannelMixer, residuals: int) -> None:
    """Biases of a channel mixer, and its residual projections."""
    for name, parameter in mlp.named_parameters():
        if name.endswith("bias"):
            _zero(parameter)
    for name in mlp.residual_projections:
        mlp.get_parameter(f"{name}.weight").div_(residuals**0.5)


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        bias.zero_()


def wide_dtype() -> torch.dtype:
    """The dtype in which weights that stay float32 are created: float32, or float64 where that is the default."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def starting(shape: int | tuple[int, ...], dtype: torch.dtype | None, values: Callable[[], Tensor]) -> Tensor:
    """What a weight starts as: ``values()``, of this shape and dtype (the default one if None).

    On the meta device nothing is computed. Arithmetic on meta tensors would import PyTorch's compiler, which takes
    seconds, and every model is first laid out on the meta device.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(shape, dtype=dtype)
    return values()


def log_uniform(size: int, low: float, high: float) -> Tensor:
    """``(size)`` of :func:`wide_dtype`, log-uniform in [low, high]."""
    width = math.log(high) - math.log(low)
    dtype = wide_dtype()
    return starting(size, dtype, lambda: torch.exp(torch.rand(size, dtype=dtype) * width + math.log(low)))


def inverse_softplus_of_log_uniform(size: int, low: float, high: float, floor: float) -> Tensor:
    """``(size)`` of :func:`wide_dtype`: Mamba's bias of Δ.

    Its softplus is log-uniform in [low, high], and at least ``floor``.
    """

    def values() -> Tensor:
        dt = log_uniform(size, low, high).clamp(min=floor)
        return dt + torch.log(-torch.expm1(-dt))

    return starting(size, wide_dtype(), values)
