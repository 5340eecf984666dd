"""The native scalar memory's backward pass (``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, plain
from ssmkernels.ops.slstm.cpu_arguments import values
from ssmkernels.ops.slstm.saved import PARTS

SEQUENCES = 8  # whose gradients of the weights are added in one part: kSequences in cpu.h


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    wide = precision(a.x)
    fields, _kept = values(a, a.x, [getattr(a, f"initial_{part}") for part in PARTS], a.cu_seqlens)
    s, (heads, p) = int(fields["sequences"]), a.x.shape[3:]
    dy = grads.y.contiguous()
    incoming = {part: getattr(grads, f"final_{part}") for part in PARTS}
    incoming = {f"dfinal_{part}": None if g is None else plain(g, wide) for part, g in incoming.items()}
    dx = a.x.new_empty(a.x.shape)
    parts = max(1, -(-s // SEQUENCES))
    shape = (heads, p, 4, p)
    new = a.x.new_empty if s else a.x.new_zeros  # of no sequence at all the sums are 0
    dR, dbias = new((parts, *shape), dtype=wide), new((parts, heads, 4, p), dtype=wide)
    states = {f"d{part}": a.x.new_empty((s, heads, p), dtype=wide) for part in PARTS}
    large_pages(dx)
    fields |= {name: address(t) for name, t in (incoming | states).items()}
    fields |= {"dy": dy.data_ptr(), "dx": dx.data_ptr(), "dR": dR.data_ptr(), "dbias": dbias.data_ptr()}
    fields |= {"gates": saved.gates.data_ptr(), "cells": saved.cells.data_ptr(), "y": 0}
    native.run("slstm_backward", fields | {f"final_{part}": 0 for part in PARTS})
    found: dict[str, Tensor | None] = {"x": dx, "R": _total(dR), "bias": _total(dbias)}
    return found | {f"initial_{part}": states[f"d{part}"] for part in PARTS}


def _total(parts: Tensor) -> Tensor:
    """The sum over the first axis, in order."""
    total = parts[0].clone()  # the first as it is would keep all others alive
    for part in parts[1:]:
        total += part
    return total
