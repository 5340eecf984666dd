"""What a forward pass keeps for its backward pass: how rows lie in memory (``compact.h``), and how many states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision

OF_STEP, STEP_ROOM = 128, 2  # numbers that share a step, and 16-bit numbers that it takes: kOfStep and kStepRoom


def kept_row(count: int, beside: Tensor) -> tuple[int, torch.dtype]:
    """How many numbers a row of ``count`` takes beside such activations, and their dtype."""
    wide = precision(beside)
    if beside.dtype == wide:
        return count, wide
    return -(-count // 2) * 2 + -(-count // OF_STEP) * STEP_ROOM, torch.int16


def kept_starts(x: Tensor, cu_seqlens: Tensor | None, tokens: int) -> Any:
    """How many states are kept, before every so many ``tokens`` of x (b l ...).

    Packed, sequence i's start at number cu_seqlens[i] // tokens + i, and some belong to no sequence.
    """
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        return batch * -(-length // tokens)
    return length // tokens + cu_seqlens.shape[0] - 1


def room_for_starts(x: Tensor, cu_seqlens: Tensor | None, shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """Memory for them beside x: zeros if some belong to no sequence."""
    made = x.new_empty if cu_seqlens is None else x.new_zeros
    return made(shape, dtype=dtype)
