"""Linear attention in Triton: what it can run, and which kernels serve a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, on_device_of, wrong_device
from ssmkernels.core.validate import precision
from ssmkernels.ops.linear_attention import triton_channels, triton_scalar, triton_sequential, triton_step

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "offline_cases", "unsupported"]

SAVES = ("starts",)  # states between tokens, (chunks h k v); none where they are computed again


def unsupported(a: Any) -> str | None:
    if 0 in (*a.v.shape[-2:], a.k.shape[-1]):
        return "no heads or channels"
    return wrong_device(a)


def sequential(a: Any) -> bool:
    """Whether the call goes token after token: chunks of matrix products are there for all but float64."""
    return a.q.dtype == torch.float64


def by_channel(a: Any) -> bool:
    """Whether its chunks need kernels of their own, and not just those of the state-space dual."""
    return a.bonus is not None or (a.log_decay is not None and a.log_decay.ndim == 4)


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state = a.declared.outputs(a)
    shape = (triton_sequential.chunks(a) if save and sequential(a) else 0, *final_state.shape[1:])
    return o, final_state, a.q.new_empty(shape, dtype=precision(a.q))


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state, starts = empty(a, save)
    with on_device_of(a.q):
        if sequential(a):
            triton_sequential.forward(a, o, final_state, starts if save else None)
        else:
            (triton_channels if by_channel(a) else triton_scalar).forward(a, o, final_state)
    return o, final_state, starts


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    with on_device_of(a.q):
        if sequential(a):
            return triton_sequential.backward(a, saved.starts, grads)
        return (triton_channels if by_channel(a) else triton_scalar).backward(a, grads)


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, k: int, v: int, decay: str, packed: bool, bonus: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        wide = precision(meta(1))
        q, values = meta(1, 256, 2, k), meta(1, 256, 4, v)
        shapes = {"": None, "head": (4,), "token": (1, 256, 4), "key": (1, 256, 4, k)}
        shape = shapes[decay]
        log_decay = None if shape is None else meta(*shape, dtype=wide)
        borders = meta(4, dtype=torch.int32) if packed else None
        state = meta(3 if packed else 1, 4, k, v, dtype=wide)
        u = meta(4, k, dtype=wide) if bonus else None
        Arguments, Step = (OPS[name].declared.Arguments for name in ("linear_attention", "linear_attention_step"))
        a = Arguments(q, q, values, log_decay, u, None, state, borders)
        o, final, starts = forward(a, True)
        backward(a, SimpleNamespace(starts=starts), SimpleNamespace(o=o, final_state=final))
        log_decay = log_decay[:, 0] if log_decay is not None and log_decay.ndim > 1 else log_decay
        triton_step.forward(Step(state[:1], q[:, 0], q[:, 0], values[:, 0], log_decay, u, None), False)

    for dtype, k, v, decay, option in (
        (torch.bfloat16, 128, 128, "key", "packed"),
        (torch.float16, 64, 64, "key", "bonus"),
        (torch.float32, 256, 256, "key", ""),
        (torch.bfloat16, 33, 17, "token", "bonus"),
        (torch.float32, 96, 192, "head", ""),
        (torch.float64, 33, 17, "", "bonus"),
    ):
        name = (
            f"{str(dtype).removeprefix('torch.')}, k {k}, v {v}, decay {decay or 'none'}{', ' * bool(option)}{option}"
        )
        yield name, functools.partial(launches, dtype, k, v, decay, option == "packed", option == "bonus")
