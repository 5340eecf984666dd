"""Norms with a gate, as ``fla.modules.fused_norm_gate`` has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.compat._calls import compatible, taking
from ssmkernels.compat._fla_norms import normed
from ssmkernels.compat.fla.modules.layernorm import Norm

__all__ = [
    "FusedLayerNormGated",
    "FusedRMSNormGated",
    "FusedRMSNormSwishGate",
    "layer_norm_gated",
    "rms_norm_gated",
]


@compatible(normed, is_rms_norm=True)
def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """:func:`ssmkernels.compat.fla.modules.layernorm.rms_norm`, times a gate.

    Args:
        g: ``(…, d)``, before its activation.
        activation: "swish", "silu" or "sigmoid".
        x, weight, bias, residual, prenorm, residual_in_fp32, eps: as there.
    """


@taking(normed, "x g weight bias activation residual prenorm residual_in_fp32 eps", rms_norm_gated, is_rms_norm=False)
def layer_norm_gated(*args: Any, **options: Any) -> Any:
    """As :func:`rms_norm_gated`, less the mean and over the deviation."""


class FusedLayerNormGated(Norm):
    """:func:`layer_norm_gated` with weights of its own.

    Args:
        hidden_size: d.
        elementwise_affine, bias: whether there is a weight, and a bias beside it.
        eps: added to the mean of squares.
        activation: of the gate.
        device, dtype: of the weights.
    """

    function = staticmethod(layer_norm_gated)

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """As :func:`layer_norm_gated`."""
        how = (self.activation, residual, prenorm, residual_in_fp32, self.eps)
        return self.function(x, g, self.weight, self.bias, *how)


class FusedRMSNormGated(FusedLayerNormGated):
    """:func:`rms_norm_gated` with a weight of its own; arguments as in :class:`FusedLayerNormGated`, but no bias."""

    function = staticmethod(rms_norm_gated)

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, False, eps, activation, device, dtype)


class FusedRMSNormSwishGate(FusedRMSNormGated):
    """:class:`FusedRMSNormGated` with "swish"."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, eps, device=device, dtype=dtype)
