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

    def launches(dtype: torch.dtype, rank: int, p: int, n: int, packed: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        heads, angles, s = 4, n // 4, 3 if packed else 1
        wide = functools.partial(meta, dtype=torch.promote_types(dtype, torch.float32))
        states = wide(s, heads, p, n), wide(s, heads, angles), wide(s, rank, heads, n), wide(s, rank, heads, p)
        x, maps, steps, turns = (
            meta(1, 64, rank, heads, p),
            meta(1, 64, rank, 1, n),
            wide(1, 64, heads),
            wide(1, 64, angles),
        )
        bias, D = wide(heads, rank, n), wide(heads)
        borders = torch.empty(4, dtype=torch.int32, device="meta") if packed else None
        Arguments, Step = (OPS[name].declared.Arguments for name in ("mamba3_scan", "mamba3_scan_step"))
        a = Arguments(x, steps, steps, maps, maps, steps, turns, bias, bias, D, x, True, None, *states, borders)
        if unsupported(a) != "float64":
            results = compute(a)
            torch.autograd.grad(results[:2], [x, steps, maps], [torch.empty_like(r) for r in results[:2]])
        x, maps, steps, turns = (t[:, 0] for t in (x, maps, steps, turns))
        with torch.no_grad():
            step = Step(*(t[:1] for t in states), x, steps, steps, maps, maps, steps, turns, bias, bias, D, x, True)
            triton_step.forward(step, False)

    for dtype, rank, p, n, packed in (
        (torch.float32, 1, 64, 128, True),
        (torch.bfloat16, 4, 33, 17, False),
        (torch.float64, 2, 64, 128, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, rank {rank}, p {p}, n {n}{', packed' * packed}"
        yield name, functools.partial(launches, dtype, rank, p, n, packed)
