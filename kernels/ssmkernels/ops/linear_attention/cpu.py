"""Linear attention in the native CPU library: what it can run, and its forward pass (``cpu.cpp``)."""

from __future__ import annotations

import functools
from typing import Any

from ssmkernels.native import missing, wrong_device
from ssmkernels.native.kept import Results, filled, kept_row, room_for_starts
from ssmkernels.ops.linear_attention.cpu_arguments import chunks, values
from ssmkernels.ops.linear_attention.cpu_backward import backward

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

SAVES = ("starts",)  # the states before the chunks, (chunks h k v): rows as ``kept_row`` says


def unsupported(a: Any) -> str | None:
    sizes = (*a.v.shape[-2:], a.k.shape[-1])
    return wrong_device(a) or ("no heads or channels" if 0 in sizes else None)


def forward(a: Any, save: bool) -> Results:
    return filled("linear_attention", "o", empty(a, save), functools.partial(values, a), save)


def empty(a: Any, save: bool) -> Results:
    o, final_state = a.declared.outputs(a)
    row, dtype = kept_row(a.v.shape[3], a.q)
    shape = (chunks(a) if save else 0, *final_state.shape[1:3], row)
    return o, final_state, room_for_starts(a.q, a.cu_seqlens, shape, dtype)
