"""How rows that a forward pass keeps for its backward pass lie in memory (``compact.h``)."""

from __future__ import annotations

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
