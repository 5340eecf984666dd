"""Norms with a gate, where the package has them.

Sizes: d channels, in groups of ``group_size``, of which each is normalised by itself; one group if None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.compat._calls import compatible, taking
from ssmkernels.compat._norms import gated

__all__ = ["LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn"]


@compatible(gated)
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """norm(x) · weight + bias, times silu(z) after it, or x times silu(z) before it.

    Args:
        x, z: ``(…, d)``.
        weight, bias: ``(d)``.
        eps: added to the variance, or to the mean of squares.
        group_size: see above.
        norm_before_gate: whether the gate comes after the norm.
        is_rms_norm: x is divided by its root mean square, and its mean is left in.

    Returns:
        ``(…, d)`` in x's dtype, computed in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """


@taking(gated, "x weight bias z eps group_size norm_before_gate", layernorm_fn)
def rmsnorm_fn(*args: Any, **options: Any) -> Tensor:
    """:func:`layernorm_fn` with ``is_rms_norm``."""


class RMSNorm(nn.Module):
    """:func:`rmsnorm_fn` with a weight of its own.

    Args:
        hidden_size: d.
        eps, group_size, norm_before_gate: as :func:`layernorm_fn`.
        device, dtype: of the weight.
    """

    bias: nn.Parameter | None
    biased = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(self.weight)) if self.biased else None)

    def reset_parameters(self) -> None:
        """The weight as it starts."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, and perhaps a gate, ``(…, d)`` → ``(…, d)``."""
        rms = self.bias is None
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, rms)


class LayerNorm(RMSNorm):
    """:func:`layernorm_fn` with a weight and a bias of its own; arguments as in :class:`RMSNorm`."""

    biased = True

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
