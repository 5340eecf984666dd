"""The native step of linear attention (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, plain
from ssmkernels.native.prepared import Prepared, update
from ssmkernels.ops.linear_attention.cpu import unsupported
from ssmkernels.ops.linear_attention.cpu_arguments import kinds
from ssmkernels.ops.linear_attention.reference import scale_of

__all__ = ["forward", "missing", "prepared", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, ("state",))


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    state = a.state.contiguous()
    wide, dtype = state.dtype, a.q.dtype
    q, k, v = (plain(t, dtype) for t in (a.q, a.k, a.v))
    log_decay, bonus = (None if t is None else plain(t, wide) for t in (a.log_decay, a.bonus))
    o = v.new_empty(v.shape)
    batch, heads, keys, values = state.shape
    tensors = {"state": state, "q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": bonus, "o": o}
    return Prepared(
        "linear_attention_step",
        {
            **{name: address(t) for name, t in tensors.items()},
            "dtype": native.DTYPES[dtype],
            "batch": batch,
            "heads": heads,
            "groups": k.shape[1],
            "keys": keys,
            "values": values,
            "threads": native.threads(state.numel()),
            "scale": scale_of(a.scale, k),
            **kinds(log_decay, 1),
        },
        tuple(tensors.values()),
        o,
        output="o",
    )
