"""Mamba-3's recurrence around the Triton kernels of the state-space dual: what it can run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, wrong_device
from ssmkernels.ops.mamba3_scan import triton_step
from ssmkernels.ops.mamba3_scan.chunks import in_chunks
from ssmkernels.ops.ssd.triton_dual import dual

__all__ = ["LOSES_TANGENTS", "compute", "missing", "offline_cases", "unsupported"]

LOSES_TANGENTS = True


def unsupported(a: Any) -> str | None:
    if a.x.dtype == torch.float64:
        return "float64"
    if 0 in (*a.x.shape[2:], a.B.shape[-1]):
        return "no inputs, heads, channels or states"
    return wrong_device(a)


def compute(a: Any) -> tuple[Tensor, ...]:
    return in_chunks(a, dual)


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, rank: int, p: int, n: int) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        heads, angles = 4, n // 4
        wide = functools.partial(meta, dtype=torch.float32)
        states = wide(1, heads, p, n), wide(1, heads, angles), wide(1, rank, heads, n), wide(1, rank, heads, p)
        x, maps, steps = meta(1, rank, heads, p), meta(1, rank, 1, n), wide(1, heads)
        bias = wide(heads, rank, n)
        step = OPS["mamba3_scan_step"].declared.Arguments(
            *states, x, steps, steps, maps, maps, steps, wide(1, angles), bias, bias, wide(heads), x, True
        )
        triton_step.forward(step, False)

    for dtype, rank, p, n in ((torch.float32, 1, 64, 128), (torch.bfloat16, 4, 64, 128), (torch.float64, 2, 33, 17)):
        name = f"{str(dtype).removeprefix('torch.')}, rank {rank}, p {p}, n {n}"
        yield name, functools.partial(launches, dtype, rank, p, n)
