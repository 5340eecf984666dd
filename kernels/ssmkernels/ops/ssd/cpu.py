"""The state-space dual in the native CPU library: what it can run, and its forward pass (``cpu.cpp``)."""

from __future__ import annotations

import functools
from typing import Any

from ssmkernels.native import missing, wrong_device
from ssmkernels.native.kept import Results, filled, kept_row, room_for_starts
from ssmkernels.ops.ssd.cpu_arguments import segments, values
from ssmkernels.ops.ssd.cpu_backward import backward

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

SAVES = ("starts",)  # the states before every fourth chunk, (segments h n p), rows as ``kept_row`` says


def unsupported(a: Any) -> str | None:
    sizes = (*a.x.shape[-2:], a.B.shape[-1])
    return wrong_device(a) or ("no heads, channels or states" if 0 in sizes else None)


def forward(a: Any, save: bool) -> Results:
    return filled("ssd", "y", empty(a, save), functools.partial(values, a), save)


def empty(a: Any, save: bool) -> Results:
    y, final_state = a.declared.outputs(a)
    row, dtype = kept_row(a.x.shape[3], a.x)
    shape = (segments(a) if save else 0, a.x.shape[2], a.B.shape[3], row)
    return y, final_state, room_for_starts(a.x, a.cu_seqlens, shape, dtype)
