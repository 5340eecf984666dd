"""The native delta rule's step (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import missing
from ssmkernels.ops.delta_rule.cpu import unsupported
from ssmkernels.ops.delta_rule.cpu_arguments import values

__all__ = ["forward", "missing", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    own = a.state.contiguous()
    o = a.v.new_empty(a.v.shape)
    fields, _kept = values(a, {"o": o, "final_state": own})
    native.run("delta_rule_step", fields)
    if own is not a.state:
        a.state.copy_(own)
    return o
