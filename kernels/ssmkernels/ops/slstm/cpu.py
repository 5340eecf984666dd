"""The scalar memory in the native library: what it can run, and its forward pass (``cpu.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.native import missing, wrong_device
from ssmkernels.ops.slstm.cpu_arguments import values
from ssmkernels.ops.slstm.cpu_backward import backward
from ssmkernels.ops.slstm.saved import PARTS, SAVES, empty

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]


def unsupported(a: Any) -> str | None:
    return "no heads or channels" if 0 in a.x.shape[3:] else wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    outputs = empty(a, save)
    y, *finals, gates, cells = outputs
    large_pages(y, gates, cells)
    fields, _kept = values(a, a.x, [getattr(a, f"initial_{part}") for part in PARTS], a.cu_seqlens)
    fields |= {f"final_{part}": state.data_ptr() for part, state in zip(PARTS, finals, strict=True)}
    kept = (gates.data_ptr(), cells.data_ptr()) if save else (0, 0)
    native.run("slstm", fields | {"y": y.data_ptr(), "gates": kept[0], "cells": kept[1]})
    return outputs
