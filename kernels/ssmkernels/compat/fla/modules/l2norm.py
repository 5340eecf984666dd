"""Vectors of length one, as ``fla.modules.l2norm`` has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla_norms import of_length_one

__all__ = ["L2Norm", "l2_norm", "l2norm"]


@compatible(of_length_one)
def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / √(Σ x² + eps) over its last axis, in ``output_dtype``, x's own if None."""


l2_norm = l2norm


class L2Norm(nn.Module):
    """:func:`l2norm` as a module."""

    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None):
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x: Tensor) -> Tensor:
        """As :func:`l2norm`."""
        return l2norm(x, self.eps, self.output_dtype)
