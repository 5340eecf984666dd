"""The matrix memory in the native library: gates (``cpu_gates.cpp``) around the state-space dual's kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import missing, wrong_device
from ssmkernels.ops.mlstm import surroundings
from ssmkernels.ops.mlstm.cpu_arguments import core, gates
from ssmkernels.ops.mlstm.cpu_backward import backward
from ssmkernels.ops.ssd.cpu_arguments import CHUNK, SEGMENT

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

SAVES = (*surroundings.SAVES, "starts")  # the states before every fourth chunk, (segments h k v+1)


def unsupported(a: Any) -> str | None:
    return "no heads, keys or values" if 0 in (*a.q.shape[2:], a.v.shape[3]) else wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    starts = _starts(a, save)
    g = gates(a)
    call, fields, _kept = core(a, g, starts if save else None)
    together = torch.empty_like(call.x)
    state = together.new_empty((*g.final_m.shape, a.v.shape[3] + 1, a.q.shape[3]))
    large_pages(together, starts)
    native.run("ssd", fields | {"y": together.data_ptr(), "final_state": state.data_ptr()})
    return *surroundings.finish(a, save, together, state, g.m, g.final_m), starts


def empty(a: Any, save: bool) -> tuple[Tensor, ...]:
    return *surroundings.empty(a, save), _starts(a, save)


def _starts(a: Any, save: bool) -> Tensor:
    tokens, (batch, length, heads, keys) = CHUNK * SEGMENT, a.q.shape
    if a.cu_seqlens is None:
        segments = batch * -(-length // tokens)
    else:
        segments = length // tokens + a.cu_seqlens.shape[0] - 1
    # Packed, some segments belong to no sequence
    new = a.q.new_zeros if save and a.cu_seqlens is not None else a.q.new_empty
    return new((segments if save else 0, heads, keys, a.v.shape[3] + 1), dtype=precision(a.q))
