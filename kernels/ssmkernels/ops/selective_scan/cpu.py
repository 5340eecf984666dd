"""The selective scan in the native CPU library: what it can run, and its forward pass (``cpu.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import missing, wrong_device
from ssmkernels.ops.selective_scan.cpu_arguments import chunk_length, kernel, numbers, values
from ssmkernels.ops.selective_scan.cpu_backward import backward

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

# The states before each chunk, (chunks n d), or (chunks 2n d) where they are complex: real and imaginary parts in turn.
SAVES = ("starts",)


def unsupported(a: Any) -> str | None:
    return wrong_device(a) or ("no channels or no states" if a.A.numel() == 0 else None)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, final_state, starts = empty(a, save)
    large_pages(y, starts)
    fields, _kept = values(a, starts if save else None)
    fields |= {"y": y.data_ptr(), "final_state": final_state.data_ptr()}
    native.run(kernel(a.A), fields)
    return y, final_state, starts


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, A = a.u, a.A
    s = u.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    chunk = chunk_length(A)
    # Packed, sequence i's chunks start at number cu_seqlens[i] // chunk + i, and some belong to no sequence
    chunks = s * -(-u.shape[1] // chunk) if a.cu_seqlens is None else u.shape[1] // chunk + s
    starts = u.new_zeros if save and a.cu_seqlens is not None else u.new_empty
    n = A.shape[1] * (2 if A.is_complex() else 1)
    return (
        u.new_empty(u.shape),
        u.new_empty((s, *A.shape), dtype=numbers(u, A)),
        starts((chunks if save else 0, n, A.shape[0]), dtype=precision(u)),
    )
