"""Mamba-3's recurrence in the native library: rotations (``cpu_rotate.cpp``) around the state-space dual's kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.native import missing, wrong_device
from ssmkernels.native.kept import kept_row, room_for_starts
from ssmkernels.ops.mamba3_scan.cpu_arguments import chunk_length, coefficients, core, last_steps, rotate, unit
from ssmkernels.ops.mamba3_scan.cpu_backward import backward
from ssmkernels.ops.ssd.cpu_arguments import LONGEST, SEGMENT

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

SAVES = ("starts",)  # the states before every fourth chunk, (segments h n p), rows as ``kept_row`` says


def unsupported(a: Any) -> str | None:
    if 0 in (*a.x.shape[-3:], a.B.shape[-1]):
        return "no inputs, heads, channels or states"
    if unit(a) > LONGEST:
        return f"a chunk of at most {LONGEST} inputs cannot hold whole steps of {a.x.shape[-3]}"
    return wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    y, final_state, _, final_key, final_value, starts = empty(a, save)
    large_pages(y, starts)
    c = coefficients(a)
    maps = rotate(a, c.dt, save=False)
    _, fields, _kept = core(a, c, maps, starts if save else None)
    native.run("ssd", fields | {"y": y.data_ptr(), "final_state": final_state.data_ptr()})
    key, value = last_steps(a, maps.k)
    return y, final_state, maps.final_angle, final_key.copy_(key), final_value.copy_(value), starts


def empty(a: Any, save: bool) -> tuple[Tensor, ...]:
    batch, length, rank, heads, p = a.x.shape
    tokens, inputs = chunk_length(a) * SEGMENT, length * rank
    if a.cu_seqlens is None:
        segments = batch * -(-inputs // tokens)
    else:
        segments = inputs // tokens + a.cu_seqlens.shape[0] - 1
    row, dtype = kept_row(p, a.x)
    shape = (segments if save else 0, heads, a.B.shape[-1], row)
    return *a.declared.outputs(a), room_for_starts(a.x, a.cu_seqlens, shape, dtype)
