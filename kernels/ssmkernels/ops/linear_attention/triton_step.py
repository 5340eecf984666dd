"""Linear attention's step in Triton: the kernel for whole sequences, for one token, with the state in its own place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.triton_support import missing, on_device_of, wrong_device
from ssmkernels.ops.linear_attention.triton_sequential import launch

__all__ = ["forward", "missing", "unsupported"]


def unsupported(a: Any) -> str | None:
    return "no heads or channels" if 0 in (*a.v.shape[1:], a.k.shape[-1]) else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    state = a.state.contiguous()
    o = a.v.new_empty(a.v.shape)
    with on_device_of(a.q):
        launch("forward", a, 1, o.shape[0], initial=state, o=o, final=state, starts=None, cu_seqlens=None)
    if state is not a.state:
        a.state.copy_(state)
    return o
