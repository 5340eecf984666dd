"""The native step of the scalar memory: its forward pass over one token, onto the state itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import missing, wrong_device
from ssmkernels.ops.slstm.cpu_arguments import values
from ssmkernels.ops.slstm.saved import PARTS

__all__ = ["forward", "missing", "unsupported"]


def unsupported(a: Any) -> str | None:
    return "no heads or channels" if 0 in a.x.shape[2:] else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    (y,) = a.declared.outputs(a)
    own = {part: getattr(a, part).contiguous() for part in PARTS}
    fields, _kept = values(a, a.x[:, None], list(own.values()), None)
    fields |= {f"final_{part}": state.data_ptr() for part, state in own.items()}
    native.run("slstm", fields | {"y": y.data_ptr(), "gates": 0, "cells": 0})
    for part, state in own.items():
        if state is not getattr(a, part):
            getattr(a, part).copy_(state)
    return y
