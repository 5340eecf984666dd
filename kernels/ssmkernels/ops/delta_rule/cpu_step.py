"""The native delta rule's step (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.native import missing
from ssmkernels.native.prepared import Prepared, update
from ssmkernels.ops.delta_rule.cpu import unsupported
from ssmkernels.ops.delta_rule.cpu_arguments import values

__all__ = ["forward", "missing", "prepared", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, ("state",))


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    o = a.v.new_empty(a.v.shape)
    fields, kept = values(a, {"o": o, "final_state": a.state.contiguous()})
    return Prepared("delta_rule_step", fields, tuple(kept), o, output="o")
