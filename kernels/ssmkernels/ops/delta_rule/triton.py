"""The delta rule in Triton: what it can run, and its forward and backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, on_device_of, wrong_device
from ssmkernels.ops.delta_rule import triton_step
from ssmkernels.ops.delta_rule.triton_launch import Backward, Chunks

__all__ = ["backward", "forward", "missing", "offline_cases", "unsupported"]

WIDEST = 256  # keys and values of a head


def unsupported(a: Any) -> str | None:
    if a.q.dtype == torch.float64:
        return "float64"
    if max(a.k.shape[3], a.v.shape[3]) > WIDEST:
        return f"heads of more than {WIDEST} channels"
    return "no heads or channels" if 0 in (*a.k.shape[2:], *a.v.shape[2:]) else wrong_device(a)


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    o, final_state = a.declared.outputs(a)
    with on_device_of(a.q):
        Chunks(a).walk(final_state, o, None, None)
    return o, final_state


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor | None]:
    with on_device_of(a.q):
        return Backward(a, grads).gradients(grads.final_state)


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, k: int, v: int, decay: str, option: str) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        step, packed = 2 if option == "strided" else 1, option == "packed"
        q, values = meta(1, 256, 4, step * k)[..., ::step], meta(1, 256, 8, step * v)[..., ::step]
        beta = meta(1, 256, 8)
        shape = (1, 256, 8, k) if decay == "channels" else (1, 256, 8)
        g = None if decay == "none" else meta(*shape, dtype=torch.float32)
        state = meta(3 if packed else 1, 8, k, v, dtype=torch.float32)
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        Arguments, Step = (OPS[name].declared.Arguments for name in ("delta_rule", "delta_rule_step"))
        a = Arguments(q, q, values, beta, g, None, state, cu_seqlens)
        o, final = forward(a, True)
        backward(a, None, SimpleNamespace(o=o, final_state=final))
        q, values, beta = q[:, 0], values[:, 0], beta[:, 0]
        triton_step.forward(Step(state[:1], q, q, values, beta, None if g is None else g[:, 0], None), False)

    for dtype, k, v, decay, option in (
        (torch.bfloat16, 128, 256, "heads", "packed"),
        (torch.bfloat16, 33, 17, "none", ""),
        (torch.bfloat16, 64, 128, "heads", "strided"),
        (torch.float16, 128, 128, "channels", ""),
        (torch.float32, 128, 128, "channels", "packed"),
        (torch.bfloat16, 256, 256, "heads", "packed"),
        (torch.float32, 192, 64, "channels", ""),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, k {k}, v {v}, decay {decay}{', ' * bool(option)}{option}"
        yield name, functools.partial(launches, dtype, k, v, decay, option)
