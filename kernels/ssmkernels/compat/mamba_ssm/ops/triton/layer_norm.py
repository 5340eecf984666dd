"""Norms of the residual stream, where the package has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.compat._calls import compatible, taking
from ssmkernels.compat._norms import added

__all__ = ["RMSNorm", "layer_norm_fn", "rms_norm_fn"]


@compatible(added)
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """r = dropout(x) + dropout(x1) + residual, then norm(r) · weight + bias.

    Args:
        x, x1, residual: ``(…, d)``.
        weight, bias: ``(d)``.
        weight1, bias1: ``(d)``, of a second output from the same r.
        eps: added to the variance, or to the mean of squares.
        dropout_p: the share of x and of x1 that is set to 0; the rest is divided by what is left.
        rowscale: ``(…)``, a factor of x; not together with x1.
        prenorm: whether to return r as well.
        residual_in_fp32: r is returned in float32 where no residual came in, whose dtype it has otherwise.
        is_rms_norm: r is divided by its root mean square, and its mean is left in.
        return_dropout_mask: whether to return what was kept of x and of x1, bool ``(…, d)`` or None.

    Returns:
        the output in x's dtype, computed in float32 (float64 for float64 input), then the second one, r, and the two
        masks, where there are any.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """


@taking(
    added,
    """
        x weight bias residual x1 weight1 bias1
        eps dropout_p rowscale prenorm residual_in_fp32 return_dropout_mask
    """,
    layer_norm_fn,
)
def rms_norm_fn(*args: Any, **options: Any) -> Any:
    """:func:`layer_norm_fn` with ``is_rms_norm``."""


class RMSNorm(nn.Module):
    """:func:`rms_norm_fn` with a weight of its own.

    Args:
        hidden_size: d.
        eps: added to the mean of squares.
        dropout_p: of x, in training.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.drop = eps, nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """The weight as it starts."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """x ``(…, d)``, and what is added to it, as :func:`layer_norm_fn` takes and returns them."""
        dropout_p = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=dropout_p,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
