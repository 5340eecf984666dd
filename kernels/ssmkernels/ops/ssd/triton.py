"""The state-space dual in Triton: what it can run, and its forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, on_device_of, wrong_device
from ssmkernels.ops.ssd import triton_step as step
from ssmkernels.ops.ssd.triton_launch import Chunks

__all__ = ["forward", "missing", "offline_cases", "unsupported"]


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

        x, dt, vector = meta(1, 256, 24, p), meta(1, 256, 24), meta(24, dtype=torch.float32)
        B = meta(1, 256, 2, 2 * n)[..., ::2] if strided else meta(1, 256, 2, n)
        D, z, bias = (None, None, None) if plain else (vector, x, vector)
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        initial = None if plain else meta(3 if packed else 1, 24, p, n, dtype=torch.float32)
        limits = (0.0, math.inf)
        Arguments, Step = (OPS[name].declared.Arguments for name in ("ssd", "ssd_step"))
        a = Arguments(x, dt, vector, B, B, D, z, bias, not plain, limits, None, initial, cu_seqlens)
        _, state = forward(a, True)
        x, dt, B, z = (t if t is None else t[:, 0] for t in (x, dt, B, z))
        step.forward(Step(state[:1], x, dt, vector, B, B, D, z, bias, not plain, limits), False)

    for dtype, p, n, option in (
        (torch.bfloat16, 64, 128, ""),
        (torch.bfloat16, 64, 128, "packed"),
        (torch.bfloat16, 64, 64, "plain"),
        (torch.bfloat16, 33, 17, ""),
        (torch.bfloat16, 128, 256, "strided"),
        (torch.float16, 64, 128, ""),
        (torch.float16, 128, 256, "packed"),
        (torch.float32, 64, 128, ""),
        (torch.float32, 16, 16, "plain"),
        (torch.float32, 128, 256, "packed"),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, p {p}, n {n}{', ' * bool(option)}{option}"
        flags = (option == "packed", option == "plain", option == "strided")
        yield name, functools.partial(launches, dtype, p, n, *flags)
