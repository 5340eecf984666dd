"""The matrix of a mixer that is linear in its values, which appears where the values are unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_values(like: Tensor, heads: int) -> Tensor:
    """``(b, l, heads, l)``: the value of each token is a channel of its own, for tensors ``(b, l, ...)``."""
    b, l = like.shape[:2]
    return torch.eye(l, dtype=like.dtype, device=like.device)[None, :, None].expand(b, l, heads, l)


def matrix_of(outputs: Tensor) -> Tensor:
    """What came of :func:`unit_values`, ``(b, l, h, l)``, as a matrix of each head, ``(b, h, l, l)``."""
    return outputs.transpose(1, 2)
