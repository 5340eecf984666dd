"""The state-space dual in Triton: what it can run, and its forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, on_device_of, wrong_device
from ssmkernels.ops.ssd import triton_step
from ssmkernels.ops.ssd.triton_backward import backward
from ssmkernels.ops.ssd.triton_launch import Chunks

__all__ = ["backward", "forward", "missing", "offline_cases", "unsupported"]


def unsupported(a: Any) -> str | None:
    if a.x.dtype == torch.float64:
        return "float64"
    if 0 in (*a.x.shape[2:], a.B.shape[3]):
        return "no heads, channels or states"
    return wrong_device(a)


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    y, final_state = a.declared.outputs(a)
    with on_device_of(a.x):
        Chunks(a, final_state).outputs(y, None, None, None)
    return y, final_state


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, p: int, n: int, packed: bool, plain: bool, strided: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        step = 2 if strided else 1
        x, B = meta(1, 256, 24, step * p)[..., ::step], meta(1, 256, 2, step * n)[..., ::step]
        dt, vector = meta(1, 256, 24), meta(24, dtype=torch.float32)
        D, z, bias = (None, None, None) if plain else (vector, x, vector)
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        initial = None if plain else meta(3 if packed else 1, 24, p, n, dtype=torch.float32)
        limits = (0.0, math.inf)
        Arguments, Step = (OPS[name].declared.Arguments for name in ("ssd", "ssd_step"))
        a = Arguments(x, dt, vector, B, B, D, z, bias, not plain, limits, None, initial, cu_seqlens)
        y, state = forward(a, True)
        backward(a, None, SimpleNamespace(y=y, final_state=None if plain else state))
        x, dt, B = x[:, 0], dt[:, 0], B[:, 0]
        triton_step.forward(
            Step(state[:1], x, dt, vector, B, B, D, None if plain else x, bias, not plain, limits), False
        )

    for dtype, p, n, option in (
        (torch.bfloat16, 64, 128, "packed"),
        (torch.bfloat16, 33, 17, ""),
        (torch.bfloat16, 128, 256, "strided"),
        (torch.float16, 64, 128, "plain"),
        (torch.float32, 64, 128, "packed"),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, p {p}, n {n}{', ' * bool(option)}{option}"
        flags = (option == "packed", option == "plain", option == "strided")
        yield name, functools.partial(launches, dtype, p, n, *flags)
