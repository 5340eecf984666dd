"""Linear attention in Triton with at most one decay for each head and token: the state-space dual's kernels.

The dual's inputs are the values, its maps the keys and queries, and its states are transposed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.ops.linear_attention.reference import scale_of
from ssmkernels.ops.ssd import triton_backward
from ssmkernels.ops.ssd.triton_dual import Call
from ssmkernels.ops.ssd.triton_launch import Chunks


def forward(a: Any, o: Tensor, final_state: Tensor) -> None:
    state = final_state.new_empty(final_state.mT.shape)
    Chunks(_call(a), state).outputs(o, None, None, None)
    final_state.copy_(state.mT)


def backward(a: Any, grads: Any) -> dict[str, Tensor | None]:
    call = _call(a)
    dstate = None if grads.final_state is None else grads.final_state.mT
    incoming = SimpleNamespace(y=grads.o, final_state=dstate)
    found = triton_backward.Backward(call, incoming, Chunks(call, None)).gradients()
    dq, dk, d_decay, d_initial = (found[name] for name in ("C", "B", "dt", "initial_state"))
    assert dq is not None
    assert d_decay is not None
    if a.log_decay is not None and a.log_decay.ndim == 1:
        d_decay = d_decay.sum((0, 1))
    return {
        "q": scale_of(a.scale, a.k) * dq,
        "k": dk,
        "v": found["x"],
        "log_decay": None if a.log_decay is None else d_decay,
        "bonus": None,
        "initial_state": None if d_initial is None else d_initial.mT.contiguous(),
    }


def _call(a: Any) -> Call:
    decay = a.q.new_zeros(1, dtype=torch.float32) if a.log_decay is None else a.log_decay.float()
    initial = None if a.initial_state is None else a.initial_state.mT.contiguous()
    queries = scale_of(a.scale, a.k) * a.q
    return Call(a.v, decay.expand(a.v.shape[:3]), a.k, queries, initial, None, a.cu_seqlens)
