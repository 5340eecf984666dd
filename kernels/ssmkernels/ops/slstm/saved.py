"""What the scalar memory's kernels keep for their backward passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.validate import precision

PARTS = ("c", "n", "h", "m")
SAVES = ("gates", "cells")  # both (b l h 4 p): the gates before activation, and c, n, h and m, at each token


def empty(a: Any, save: bool) -> tuple[Tensor, ...]:
    batch, length, _, heads, p = a.x.shape
    shape = (batch if save else 0, length, heads, 4, p)
    gates, cells = (a.x.new_empty(shape, dtype=precision(a.x)) for _ in range(2))
    return *a.declared.outputs(a), gates, cells
