"""The delta rule in the native CPU library: what it can run, and its forward pass (``cpu.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import missing, wrong_device
from ssmkernels.native.kept import kept_row
from ssmkernels.ops.delta_rule.cpu_arguments import segments, values
from ssmkernels.ops.delta_rule.cpu_backward import backward

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

# The states before every segment, (segments h k v), and the errors of all tokens, (b h l v): rows as ``kept_row`` says,
# and where errors are not compact each row in whole cache lines
SAVES = ("starts", "errors")


def unsupported(a: Any) -> str | None:
    sizes = (*a.k.shape[-2:], *a.v.shape[-2:])
    return wrong_device(a) or ("no heads or channels" if 0 in sizes else None)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, final_state, starts, errors = empty(a, save)
    large_pages(o, starts, errors)
    outputs = {"o": o, "final_state": final_state} | ({"starts": starts, "errors": errors} if save else {})
    fields, _kept = values(a, outputs, a.initial_state, a.cu_seqlens)
    native.run("delta_rule", fields)
    if errors.dtype == precision(a.q) and errors.shape[-1] > a.v.shape[-1]:
        errors[..., a.v.shape[-1] :] = 0  # how much of a row's end the kernel writes depends on its vectors
    return o, final_state, starts, errors


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, final_state = a.declared.outputs(a)
    wide = precision(a.q)
    batch, length, heads, size = a.v.shape
    row, kept = kept_row(size, a.q)
    line = 64 // wide.itemsize
    whole = row if kept != wide else -(-size // line) * line
    errors = a.q.new_empty((batch, heads, length if save else 0, whole), dtype=kept)
    # Packed, some segments belong to no sequence
    starts = a.q.new_zeros if save and a.cu_seqlens is not None else a.q.new_empty
    return o, final_state, starts((segments(a) if save else 0, heads, a.k.shape[3], row), dtype=kept), errors
