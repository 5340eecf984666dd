"""The general delta rule in Triton: what it can run, and which kernels serve a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, on_device_of
from ssmkernels.core.validate import precision
from ssmkernels.ops.generalized_delta_rule import triton_chunks, triton_sequential, triton_step
from ssmkernels.ops.generalized_delta_rule.cpu_arguments import segment_length, segments
from ssmkernels.ops.generalized_delta_rule.triton_step import unsupported

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "offline_cases", "unsupported"]

SAVES = ("starts",)  # the states before every segment, (segments h k v); none where they are computed again


def sequential(a: Any) -> bool:
    """Whether the call goes token after token: float64 has no matrix products to gain, and wide states do not fit."""
    return a.q.dtype == torch.float64 or a.k.shape[3] > triton_chunks.WIDEST


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state, starts = empty(a, save)
    if sequential(a):
        triton_sequential.forward(a, o, final_state, starts, save)
    else:
        with on_device_of(a.q):
            triton_chunks.forward(a, o, final_state)
    return o, final_state, starts


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    if sequential(a):
        return triton_sequential.backward(a, saved.starts, grads)
    with on_device_of(a.q):
        return triton_chunks.backward(a, grads)


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state = a.declared.outputs(a)
    new = a.q.new_zeros if save and a.cu_seqlens is not None else a.q.new_empty
    states = segments(a, segment_length(a.q.shape[3], a.v.shape[3])) if save and sequential(a) else 0
    return (
        o,
        final_state,
        new((states, *final_state.shape[1:]), dtype=precision(a.q)),
    )


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""
    for dtype, k, v, decay, packed in (
        (torch.bfloat16, 64, 64, True, True),
        (torch.float32, 64, 64, True, False),
        (torch.float16, 128, 96, True, False),
        (torch.float32, 128, 33, False, True),
        (torch.float64, 64, 64, True, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, {k} x {v}{', packed' * packed}"
        yield name, functools.partial(_launches, dtype, k, v, decay, packed)


def _launches(dtype: torch.dtype, k: int, v: int, decay: bool, packed: bool) -> None:
    wide = torch.promote_types(dtype, torch.float32)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    keys = meta(1, 64, 4, k)
    g = meta(1, 64, 4, k, dtype=wide) if decay else None
    s = 3 if packed else 1
    initial, borders = meta(s, 4, k, v, dtype=wide), meta(s + 1, dtype=torch.int32) if packed else None
    given = (keys, keys, meta(1, 64, 4, v), keys, keys, g, None)
    call = OPS["generalized_delta_rule"].declared.Arguments(*given, initial if packed else None, borders)
    o, final, starts = forward(call, True)
    grads = SimpleNamespace(o=o, final_state=final if packed else None)
    backward(call, SimpleNamespace(starts=starts), grads)
    step = [x[:, 0] if isinstance(x, Tensor) else x for x in given]
    triton_step.forward(OPS["generalized_delta_rule_step"].declared.Arguments(initial[:1], *step), False)
