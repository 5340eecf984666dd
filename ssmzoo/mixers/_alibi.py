"""Slopes of attention with linear biases (ALiBi; Press et al. 2022, arXiv 2108.12409, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.validate import precision


def alibi_slopes(n_heads: int, like: Tensor) -> Tensor:
    """``(n_heads)``, on the device of ``like``, float32 (float64 for float64).

    Of n heads, n a power of two, head i = 1 … n has 2^(-8i / n). For any other number the authors' code takes those of
    the power of two below, and for the remaining heads every other one of those of the power of two above.
    """
    power = 1 << (n_heads.bit_length() - 1)
    head = torch.arange(n_heads, device=like.device)
    step = torch.where(head < power, 2 * head + 2, 2 * (head - power) + 1)
    return torch.exp2(step.to(precision(like)) * (-4 / power))
