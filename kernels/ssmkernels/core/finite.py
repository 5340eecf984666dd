"""Exponentials of learned logarithms that never overflow, and options that fit float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32).max


def finite_exp(x: Tensor) -> Tensor:
    """e^x of any shape and floating dtype, with x cut off where e^x would overflow: at 88 in float32, 709 in float64.

    For rates of decay. Had one overflowed, its log decays would be -∞, or NaN for a step of 0, and their gradients
    0 · ∞. In exact arithmetic so fast a decay is 0, and nothing passes through it: that is the gradient beyond the
    limit.
    """
    return torch.exp(x.clamp(max=math.floor(math.log(torch.finfo(x.dtype).max))))


def check_float32(op: str, /, **options: Any) -> None:
    """Checks that numbers fit float32, in which an op computes. None passes, and of two limits one that is no limit.

    Args:
        op: the function's name, for the message.
        options: by name.

    Raises:
        ValueError: a finite number that would be infinite in float32.
    """
    for name, value in options.items():
        if isinstance(value, tuple | list):  # a least above all of float32, or a most below it
            least, most = value
            _check_float32(op, f"{name}[0]", least if least > 0 else None)
            _check_float32(op, f"{name}[1]", most if most < 0 else None)
        else:
            _check_float32(op, name, value)


def _check_float32(op: str, name: str, value: Any) -> None:
    if value is not None and FLOAT32 < abs(value) < math.inf:
        raise ValueError(f"{op}: `{name}` must fit in float32, at most {FLOAT32:.7g} in size; got {value}")
