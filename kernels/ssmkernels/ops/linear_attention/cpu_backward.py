"""The native backward pass of linear attention (``cpu_backward.cpp``)."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, plain
from ssmkernels.ops.linear_attention.cpu_arguments import values
from ssmkernels.ops.linear_attention.gradients import added


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    wide = precision(a.q)
    fields, _kept = values(a, saved.starts)
    batch, length, groups, k = a.k.shape
    heads, s = a.v.shape[2], int(fields["sequences"])
    maps = a.k.dtype if heads == groups else wide
    dq, dk = (a.k.new_empty((batch, length, heads, k), dtype=maps) for _ in range(2))
    dv = a.v.new_empty(a.v.shape)
    # One for each sequence, of which there may be none
    of_heads = functools.partial(a.v.new_zeros if s == 0 else a.v.new_empty, dtype=wide)
    d_decay = d_bonus = d_initial = None
    if a.log_decay is not None and "log_decay" in grads.wanted:
        fixed = a.log_decay.ndim == 1
        d_decay = of_heads((max(s, 1), heads)) if fixed else a.v.new_empty(a.log_decay.shape, dtype=wide)
    if a.bonus is not None:
        d_bonus = of_heads((max(s, 1), heads, k))
    if a.initial_state is not None:
        d_initial = a.v.new_empty(a.initial_state.shape, dtype=wide)
    d_o = grads.o.contiguous()
    d_final = None if grads.final_state is None else plain(grads.final_state, wide)
    large_pages(dq, dk, dv, d_decay)
    outputs = {"dq": dq, "dk": dk, "dv": dv, "d_decay": d_decay, "d_bonus": d_bonus, "d_initial": d_initial}
    outputs |= {"d_o": d_o, "d_final": d_final}
    fields |= {"o": 0, "final_state": 0, "maps": native.DTYPES[maps]}
    native.run("linear_attention_backward", fields | {name: address(t) for name, t in outputs.items()})
    if heads != groups:
        dq, dk = (added(t.unflatten(2, (groups, heads // groups)), 3) for t in (dq, dk))
    return {
        "q": dq,
        "k": dk,
        "v": dv,
        "log_decay": added(d_decay, 0) if d_decay is not None and a.log_decay.ndim == 1 else d_decay,
        "bonus": None if d_bonus is None else added(d_bonus, 0),
        "initial_state": d_initial,
    }
