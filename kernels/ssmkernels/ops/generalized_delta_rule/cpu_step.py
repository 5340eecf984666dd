"""The general delta rule's step in the native CPU library: a sequence of one token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ssmkernels.native import missing
from ssmkernels.native.prepared import Prepared, update
from ssmkernels.ops.generalized_delta_rule.cpu import unsupported
from ssmkernels.ops.generalized_delta_rule.cpu_arguments import ACTIVATIONS, values

__all__ = ["forward", "missing", "prepared", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, ("state",))


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    own = a.state.contiguous()
    timed = {name: getattr(a, name)[:, None] for name in ACTIVATIONS}
    decay = None if a.log_decay is None else a.log_decay[:, None]
    sequence = SimpleNamespace(**timed, log_decay=decay, scale=a.scale, initial_state=own, cu_seqlens=None)
    fields, kept = values(sequence, None)
    o = a.v.new_empty(a.v.shape)
    # A task reads the state of its head before it writes it
    fields |= {"o": o.data_ptr(), "final_state": own.data_ptr()}
    return Prepared("generalized_delta_rule", fields, (*kept, o), o, output="o")
