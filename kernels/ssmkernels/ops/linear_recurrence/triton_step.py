"""The linear recurrence's step in Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.triton_support import missing, wrong_device
from ssmkernels.ops.linear_recurrence.one import give_back, sequence_of_one
from ssmkernels.ops.linear_recurrence.triton_launch import launch

__all__ = ["forward", "missing", "unsupported"]


def unsupported(a: Any) -> str | None:
    return "no channels" if a.b.shape[1] == 0 else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    sequence, state = sequence_of_one(a)
    h = a.b.new_empty(a.b.shape)
    launch(sequence, h, state, None)
    give_back(a, state)
    return h
