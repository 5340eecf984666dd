"""The matrix memory in the native library: gates (``cpu_gates.cpp``) around the state-space dual's kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import missing, wrong_device
from ssmkernels.ops.mlstm.cpu_arguments import core, gates
from ssmkernels.ops.mlstm.cpu_backward import backward
from ssmkernels.ops.mlstm.reference import EPSILON, scale_of
from ssmkernels.ops.ssd.cpu_arguments import CHUNK, SEGMENT

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

SAVES = ("y", "final_C", "final_n", "starts", "sums", "exact")


def unsupported(a: Any) -> str | None:
    return "no heads, keys or values" if 0 in (*a.q.shape[2:], a.v.shape[3]) else wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    y, final_C, final_n, _, starts, sums, exact = empty(a, save)
    g = gates(a)
    call, fields, _kept = core(a, g, starts if save else None)
    together, state = torch.empty_like(call.x), final_C.new_empty((*final_n.shape[:2], a.v.shape[3] + 1, a.q.shape[3]))
    large_pages(y, together, starts)
    native.run("ssd", fields | {"y": together.data_ptr(), "final_state": state.data_ptr()})
    scale = scale_of(a.scale, a.q)
    scaled = together[..., -1] * scale  # (b l h)
    below = torch.maximum(scaled.abs(), torch.exp(-g.m)) + EPSILON
    to = exact if exact.numel() else y
    torch.mul(together[..., :-1], (scale / below)[..., None], out=to)
    if save:
        sums.copy_(scaled)
    if to is not y:
        y.copy_(to)
    final_C.copy_(state[:, :, :-1].mT)
    final_n.copy_(state[:, :, -1])
    return y, final_C, final_n, g.final_m, starts, sums, exact


def empty(a: Any, save: bool) -> tuple[Tensor, ...]:
    """The results; where they are saved, the states before every fourth chunk, n·q, and y before it is rounded."""
    tokens, (batch, length, heads, keys) = CHUNK * SEGMENT, a.q.shape
    if a.cu_seqlens is None:
        segments = batch * -(-length // tokens)
    else:
        segments = length // tokens + a.cu_seqlens.shape[0] - 1
    shape = (segments if save else 0, heads, keys, a.v.shape[3] + 1)
    wide = precision(a.q)
    # Packed, some segments belong to no sequence
    starts = a.q.new_zeros if save and a.cu_seqlens is not None else a.q.new_empty
    sums = a.q.new_empty(a.i.shape if save else 0, dtype=wide)
    exact = a.q.new_empty(a.v.shape if save and a.q.dtype != wide else 0, dtype=wide)
    return *a.declared.outputs(a), starts(shape, dtype=wide), sums, exact
