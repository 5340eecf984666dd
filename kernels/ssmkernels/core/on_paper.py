"""Calls whose shapes alone are computed, as a device that need not be there would run them.

Meta tensors have no memory. An op that is given some takes the way of PyTorch's own operators, as a rule; within
:func:`on_paper` it takes the operator of the kernel that the device would run, whose fake says what it returns and
keeps for the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

KERNELS_OF = {"cpu": "cpu", "cuda": "triton"}  # a kind of device → the implementation of its kernels

_kinds: list[str] = []


@contextlib.contextmanager
def on_paper(kind: str) -> Iterator[None]:
    """Within, meta tensors stand for those of a device of this kind, "cpu" or "cuda"."""
    _kinds.append(kind)
    try:
        yield
    finally:
        _kinds.pop()


def kind_of(device: torch.device) -> str:
    """The kind of device that a tensor's device is, or stands for."""
    return _kinds[-1] if _kinds and device.type == "meta" else device.type


def stands_for(a: Any) -> str | None:
    """The kind of device that an op's arguments stand for; None where they are what they are."""
    if not _kinds or not any(isinstance(x, Tensor) and x.is_meta for x in a):
        return None
    return _kinds[-1]


def record(implementation: Any, a: Any) -> Any:
    """The results of an implementation on meta tensors, recorded by autograd where gradients are wanted."""
    operator = getattr(implementation.function, "operator", None)
    if operator is None:
        return implementation.function(a)
    takes_save = len(operator._schema.arguments) > len(a)
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in a)
    found = operator(*a, wanted) if takes_save else operator(*a)
    results = len(a.declared.results)
    if isinstance(found, Tensor):
        return found
    return found[0] if results == 1 else tuple(found[:results])
