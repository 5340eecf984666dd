"""The linear recurrence's step in the native CPU library."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import missing
from ssmkernels.native import wrong_device as unsupported
from ssmkernels.ops.linear_recurrence.cpu import fields_of
from ssmkernels.ops.linear_recurrence.one import give_back, sequence_of_one

__all__ = ["forward", "missing", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    sequence, state = sequence_of_one(a)
    fields, _kept = fields_of(sequence)
    h = a.b.new_empty(a.b.shape)
    native.run("linear_recurrence", fields | {"h": h.data_ptr(), "final_state": state.data_ptr(), "states": 0})
    give_back(a, state)
    return h
