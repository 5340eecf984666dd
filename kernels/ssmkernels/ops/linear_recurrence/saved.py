"""What the kernels of the linear recurrence keep for their backward passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SAVES = ("h", "states")  # every state in the precision of sums, where h is rounded to half precision


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h, the final state, and the states, which are only kept where h is narrower."""
    h, final_state = a.declared.outputs(a)
    wide = final_state.dtype
    return h, final_state, h.new_empty(h.shape if save and wide != h.dtype else (0,), dtype=wide)
