"""The native delta rule's backward pass (``cpu_backward.cpp``)."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, plain
from ssmkernels.ops.delta_rule.cpu_arguments import values

HEADS = 4  # of a group, whose gradients of q and k are added in one part: kHeads in cpu_segment.h


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    wide = precision(a.q)
    fields, _kept = values(a, {"starts": saved.starts, "errors": saved.errors}, a.initial_state, a.cu_seqlens)
    empty = functools.partial(a.q.new_empty, dtype=wide)
    ratio = a.v.shape[2] // a.k.shape[2]
    parts = -(-ratio // HEADS)
    dq, dk = (a.q.new_empty((parts, *a.k.shape), dtype=wide if ratio > 1 else a.q.dtype) for _ in range(2))
    dv = a.v.new_empty(a.v.shape)
    dbeta = empty(a.beta.shape)
    ddecay = None if a.log_decay is None else empty(a.log_decay.shape)
    dinitial = None if a.initial_state is None else empty(a.initial_state.shape)
    large_pages(dq, dk, dv, ddecay)
    tensors = {
        "d_o": grads.o.contiguous(),
        "dfinal": None if grads.final_state is None else plain(grads.final_state, wide),
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "dbeta": dbeta,
        "ddecay": ddecay,
        "dinitial": dinitial,
    }
    native.run("delta_rule_backward", fields | {name: address(t) for name, t in tensors.items()})
    return {
        "q": dq[0] if parts == 1 else dq.sum(0),
        "k": dk[0] if parts == 1 else dk.sum(0),
        "v": dv,
        "beta": dbeta,
        "log_decay": ddecay,
        "initial_state": dinitial,
    }
