"""The matrix memory in the native library: gates (``cpu_gates.cpp``) around the state-space dual's kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import missing, wrong_device
from ssmkernels.native.kept import kept_row
from ssmkernels.ops.mlstm.cpu_arguments import chunk_length, core, gates, segment
from ssmkernels.ops.mlstm.cpu_backward import backward

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

# Scaled n·q, m, and what it makes of the gates, (b l h) each; the states before every segment of chunks,
# (segments h k v+1), rows as ``kept_row`` says
SAVES = ("sums", "m", "decay", "weight", "starts")


def unsupported(a: Any) -> str | None:
    return "no heads, keys or values" if 0 in (*a.q.shape[2:], a.v.shape[3]) else wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    y, final_C, final_n, _, sums, *kept, starts = empty(a, save)
    g = gates(a)
    _call, fields, _kept = core(a, g, starts if save else None, sums)
    state = g.m.new_empty((*g.final_m.shape, a.v.shape[3] + 1, a.q.shape[3]))
    large_pages(y, starts)
    native.run("ssd", fields | {"y": y.data_ptr(), "final_state": state.data_ptr()})
    final_C.copy_(state[:, :, :-1].mT)
    final_n.copy_(state[:, :, -1])
    return y, final_C, final_n, g.final_m, sums, *((g.m, g.decay, g.weight) if save else kept), starts


def empty(a: Any, save: bool) -> tuple[Tensor, ...]:
    of_tokens = (a.q.new_empty(a.i.shape if save else 0, dtype=precision(a.q)) for _ in SAVES[:-1])
    return *a.declared.outputs(a), *of_tokens, _starts(a, save)


def _starts(a: Any, save: bool) -> Tensor:
    tokens, (batch, length, heads, keys) = chunk_length(a) * segment(a), a.q.shape
    if a.cu_seqlens is None:
        segments = batch * -(-length // tokens)
    else:
        segments = length // tokens + a.cu_seqlens.shape[0] - 1
    # Packed, some segments belong to no sequence
    new = a.q.new_zeros if save and a.cu_seqlens is not None else a.q.new_empty
    row, dtype = kept_row(a.v.shape[3] + 1, a.q)
    return new((segments if save else 0, heads, keys, row), dtype=dtype)
