"""The general delta rule's step in the native CPU library: a sequence of one token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import missing
from ssmkernels.ops.generalized_delta_rule.cpu import unsupported
from ssmkernels.ops.generalized_delta_rule.cpu_arguments import ACTIVATIONS, values

__all__ = ["forward", "missing", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    own = a.state.contiguous()
    timed = {name: getattr(a, name)[:, None] for name in ACTIVATIONS}
    decay = None if a.log_decay is None else a.log_decay[:, None]
    sequence = SimpleNamespace(**timed, log_decay=decay, scale=a.scale, initial_state=own, cu_seqlens=None)
    fields, _kept = values(sequence, None)
    o = a.v.new_empty(a.v.shape)
    # A task reads the state of its head before it writes it
    native.run("generalized_delta_rule", fields | {"o": o.data_ptr(), "final_state": own.data_ptr()})
    if own is not a.state:
        a.state.copy_(own)
    return o
