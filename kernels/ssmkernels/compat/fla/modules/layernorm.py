"""Norms, as ``fla.modules.layernorm`` has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.compat._calls import compatible, taking
from ssmkernels.compat._fla_norms import normed

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "rms_norm"]


@compatible(normed, is_rms_norm=True)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """x + residual over its root mean square, times the weight, plus the bias.

    Args:
        x, residual: ``(…, d)``.
        weight, bias: ``(d)``.
        eps: added to the mean of squares.
        prenorm: whether to return the sum as well.
        residual_in_fp32: whether that is float32.

    Returns:
        ``(…, d)`` in x's dtype, and with ``prenorm`` the sum, in the residual's.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """


@taking(normed, "x weight bias residual eps prenorm residual_in_fp32 is_rms_norm", rms_norm)
def layer_norm(*args: Any, is_rms_norm: bool = False, **options: Any) -> Any:
    """As :func:`rms_norm`, less the mean and over the deviation, unless ``is_rms_norm``."""


class Norm(nn.Module):
    """The weights of a norm."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool,
        bias: bool,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.hidden_size, self.elementwise_affine, self.eps = hidden_size, elementwise_affine, eps
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros_like(self.weight)) if bias else None

    def reset_parameters(self) -> None:
        """The weights as they start."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class RMSNorm(Norm):
    """:func:`rms_norm` with weights of its own.

    Args:
        hidden_size: d.
        elementwise_affine, bias: whether there is a weight, and a bias beside it.
        eps: added to the mean of squares.
        device, dtype: of the weights.
    """

    function = staticmethod(rms_norm)

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """As :func:`rms_norm`."""
        return self.function(x, self.weight, self.bias, residual, self.eps, prenorm, residual_in_fp32)


class LayerNorm(RMSNorm):
    """:func:`layer_norm` with weights of its own; arguments as in :class:`RMSNorm`."""

    function = staticmethod(layer_norm)
