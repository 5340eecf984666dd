"""What the scalar memory's kernels keep for their backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision

PARTS = ("c", "n", "h", "m")
SAVES = ("gates", "cells")  # both (b l h 4 p): the gates before activation, and c, n, h and m, at each token


def empty(a: Any, save: bool) -> tuple[Tensor, ...]:
    batch, length, _, heads, p = a.x.shape
    shape = (batch if save else 0, length, heads, 4, p)
    gates, cells = (a.x.new_empty(shape, dtype=precision(a.x)) for _ in range(2))
    return *a.declared.outputs(a), gates, cells


def before_first(a: Any, cells: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States before the first token of each sequence and after its last, (s h p) by part; 0 where it has none."""
    batch, length, _, heads, p = a.x.shape
    s = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    zeros = cells.new_zeros((s, heads, p))
    if a.cu_seqlens is None:
        none = torch.full((s,), length == 0, device=cells.device)
        ends = cells[:, -1] if length else cells.new_zeros((s, heads, 4, p))
    else:
        none = a.cu_seqlens.diff() == 0
        ends = cells[0, (a.cu_seqlens[1:].long() - 1).clamp(min=0)] if length else cells.new_zeros((s, heads, 4, p))
    given = {part: getattr(a, f"initial_{part}") for part in PARTS}
    absent = none[:, None, None]
    first = {part: zeros if x is None else torch.where(absent, 0, x) for part, x in given.items()}
    last = {part: torch.where(absent, 0, ends[:, :, i]) for i, part in enumerate(PARTS)}
    return first, last
