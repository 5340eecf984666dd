"""Linear attention in Triton: what it can run, and its two passes."""

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
from ssmkernels.ops.linear_attention import triton_step
from ssmkernels.ops.linear_attention.gradients import added
from ssmkernels.ops.linear_attention.triton_launch import CHUNK, blocks, chunks, launch, plain

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "offline_cases", "unsupported"]

SAVES = ("starts",)  # the states before every 64 tokens, (chunks h k v)


def unsupported(a: Any) -> str | None:
    if 0 in (*a.v.shape[-2:], a.k.shape[-1]):
        return "no heads or channels"
    return wrong_device(a)


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state = a.declared.outputs(a)
    shape = (chunks(a) if save else 0, *final_state.shape[1:])
    return o, final_state, a.q.new_empty(shape, dtype=precision(a.q))


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state, starts = empty(a, save)
    with on_device_of(a.q):
        launch(
            "forward",
            a,
            2,
            final_state.shape[0],
            initial=plain(a.initial_state),
            o=o,
            final=final_state,
            starts=starts if save else None,
            cu_seqlens=plain(a.cu_seqlens),
        )
    return o, final_state, starts


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    wide = precision(a.q)
    (batch, length, _, k), heads = a.k.shape, a.v.shape[2]
    s = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    block_k, block_v, tiles = blocks(a)

    def parts(*shape: int) -> Tensor:
        return a.q.new_empty((tiles, *shape), dtype=wide)

    dq, dk, dv = parts(batch, length, heads, k), parts(batch, length, heads, k), a.v.new_empty(a.v.shape)
    d_decay = d_bonus = d_initial = None
    if a.log_decay is not None:
        d_decay = parts(s, heads) if a.log_decay.ndim == 1 else parts(*a.log_decay.shape)
    if a.bonus is not None:
        d_bonus = parts(s, heads, k)
    if a.initial_state is not None:
        d_initial = a.v.new_empty(a.initial_state.shape, dtype=wide)
    with on_device_of(a.q):
        launch(
            "backward",
            a,
            2,
            s,
            starts=saved.starts,
            kept=a.q.new_empty(s * heads * tiles, CHUNK, block_k, block_v, dtype=wide),
            d_o=grads.o.contiguous(),
            d_final=plain(grads.final_state),
            dq=dq,
            dk=dk,
            dv=dv,
            d_decay=d_decay,
            d_bonus=d_bonus,
            d_initial=d_initial,
            cu_seqlens=plain(a.cu_seqlens),
            part_key=batch * length * heads * k,
            part_token=batch * length * heads,
            part_sequence=s * heads,
        )
    d_decay, d_bonus = (None if t is None else added(t, 0) for t in (d_decay, d_bonus))
    return {
        "q": added(added(dq, 0).unflatten(2, (a.k.shape[2], -1)), 3),
        "k": added(added(dk, 0).unflatten(2, (a.k.shape[2], -1)), 3),
        "v": dv,
        "log_decay": added(d_decay, 0) if d_decay is not None and a.log_decay.ndim == 1 else d_decay,
        "bonus": None if d_bonus is None else added(d_bonus, 0),
        "initial_state": d_initial,
    }


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
        (torch.float32, 96, 192, "token", ""),
        (torch.float16, 64, 64, "key", "bonus"),
        (torch.float32, 256, 256, "head", ""),
        (torch.float64, 33, 17, "", "bonus"),
    ):
        name = (
            f"{str(dtype).removeprefix('torch.')}, k {k}, v {v}, decay {decay or 'none'}{', ' * bool(option)}{option}"
        )
        yield name, functools.partial(launches, dtype, k, v, decay, option == "packed", option == "bonus")
