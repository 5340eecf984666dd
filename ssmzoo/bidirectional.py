"""Reading sequences from their ends: what makes a mixer of two directions out of one that looks back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def bidirectional(
    ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], x: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """``ahead(x)``, plus what ``back`` makes of every sequence read from its end.

    Args:
        ahead, back: causal functions of ``(b, l, …)``, with weights of their own.
        x: ``(b, l, …)``.
        cu_seqlens: int32 ``(s + 1)``, borders of packed sequences; each turns round within its own.
    """
    if cu_seqlens is None:
        return ahead(x) + back(x.flip(1)).flip(1)
    order = backwards(cu_seqlens, x.shape[1])
    return ahead(x) + back(x.index_select(1, order)).index_select(1, order)


def backwards(cu_seqlens: Tensor, length: int) -> Tensor:
    """int64 ``(length)``: for each position of a packed batch, the one that mirrors it within its own sequence."""
    position = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], position, right=True)
    return (cu_seqlens[sequence] + cu_seqlens[sequence + 1] - 1 - position).long()
