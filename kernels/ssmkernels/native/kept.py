"""What a forward pass keeps for its backward pass: how rows lie in memory (``compact.h``), and how many states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision

Results = tuple[Tensor, Tensor, Tensor]  # outputs, final states, and states that are kept

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


def filled(kernel: str, output: str, made: Results, values: Callable[[Tensor | None], Any], save: bool) -> Results:
    """What is ``made``, once a kernel has filled it: ``output`` is its name for the outputs, and ``values`` gives its
    other arguments, and the tensors that they point into, from the states to keep, if it is to ``save`` them."""
    outputs, final_state, starts = made
    large_pages(outputs, starts)
    fields, _kept = values(starts if save else None)
    native.run(kernel, fields | {output: outputs.data_ptr(), "final_state": final_state.data_ptr()})
    return made
