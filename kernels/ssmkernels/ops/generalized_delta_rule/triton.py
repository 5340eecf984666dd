"""The general delta rule in Triton: what it can run, and its launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import (
    all_registers,
    kernels,
    missing,
    next_power_of_2,
    on_device_of,
    wrong_device,
)
from ssmkernels.core.validate import precision
from ssmkernels.ops.generalized_delta_rule.cpu_arguments import ACTIVATIONS, segment_length, segments
from ssmkernels.ops.generalized_delta_rule.reference import scale_of
from ssmkernels.ops.ssd.triton_arguments import strides

__all__ = ["SAVES", "backward", "empty", "forward", "launch", "missing", "offline_cases", "unsupported"]

SAVES = ("starts",)  # the states before every segment, (segments h k v)
WARPS = {"forward": 4, "backward": 8}  # the latter has four times as much in registers
AXES = ("batch", "time", "head", "step")
NUMBERS = 2048  # of a state that a program has in registers, in float32


def unsupported(a: Any) -> str | None:
    if a.q.shape[-1] > NUMBERS:
        return f"heads of more than {NUMBERS} key channels"
    return "no heads or channels" if 0 in (*a.q.shape[-2:], a.v.shape[-1]) else wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state, starts = empty(a, save)
    initial = None if a.initial_state is None else a.initial_state.contiguous()
    launch("forward", a, initial=initial, o=o, final=final_state, starts=starts, SAVE=save)
    return o, final_state, starts


def launch(kernel: str, a: Any, **given: Any) -> None:
    """A program for each sequence, head and block of values; ``given`` is what the two kernels do not share."""
    fields, programs = _sizes(a)
    if programs:
        tensors = {name: getattr(a, name) for name in ACTIVATIONS} | {"decay": a.log_decay}
        for name, x in tensors.items():
            fields |= strides(name, x, AXES)
        with on_device_of(a.q):
            getattr(kernels(__package__), kernel)[(programs,)](
                **tensors,
                **given,
                **fields,
                cu_seqlens=a.cu_seqlens,
                scale=scale_of(a.q, a.scale),
                T=a.q.shape[1],
                num_warps=WARPS[kernel],
                **all_registers(),
            )


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    wide = precision(a.q)
    fields, programs = _sizes(a)
    tiles = -(-a.v.shape[3] // fields["BLOCK_V"])
    parts = {name: a.q.new_empty(tiles, *a.q.shape, dtype=wide) for name in ("q", "k", "a", "b", "log_decay")}
    dv = a.v.new_empty(a.v.shape)
    d_initial = a.q.new_empty(_sequences(a), *saved.starts.shape[1:], dtype=wide)
    launch(
        "backward",
        a,
        starts=saved.starts,
        states=a.q.new_empty(programs, fields["SEGMENT"], fields["BLOCK_K"], fields["BLOCK_V"], dtype=wide),
        d_o=grads.o.contiguous(),
        d_final=None if grads.final_state is None else grads.final_state.contiguous(),
        dv=dv,
        d_initial=d_initial,
        part=a.q.numel(),
        d_decay=parts["log_decay"],
        **{f"d{name}": parts[name] for name in ("q", "k", "a", "b")},
    )
    summed = {name: x[0] if tiles == 1 else x.sum(0) for name, x in parts.items()}
    return {**summed, "v": dv, "initial_state": d_initial}


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state = a.declared.outputs(a)
    new = a.q.new_zeros if save and a.cu_seqlens is not None else a.q.new_empty
    return o, final_state, new((segments(a) if save else 0, *final_state.shape[1:]), dtype=precision(a.q))


def _sequences(a: Any) -> int:
    """How many there are."""
    return a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1


def _sizes(a: Any) -> tuple[dict[str, Any], int]:
    """The constants of both kernels, and the number of programs."""
    (heads, k), v = a.q.shape[2:], a.v.shape[3]
    block_k = next_power_of_2(k)
    block_v = min(next_power_of_2(v), max(1, (NUMBERS if a.q.dtype != torch.float64 else NUMBERS // 2) // block_k))
    constants = {"SEGMENT": segment_length(k, v), "H": heads, "K": k, "V": v, "BLOCK_K": block_k, "BLOCK_V": block_v}
    return constants, _sequences(a) * heads * -(-v // block_v)


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""
    for dtype, k, v, decay, packed in (
        (torch.bfloat16, 64, 64, True, True),
        (torch.float32, 64, 64, True, False),
        (torch.float16, 128, 96, False, False),
        (torch.float64, 64, 64, True, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, {k} x {v}{', packed' * packed}"
        yield name, functools.partial(_launches, dtype, k, v, decay, packed)


def _launches(dtype: torch.dtype, k: int, v: int, decay: bool, packed: bool) -> None:
    from ssmkernels.ops.generalized_delta_rule import triton_step  # which imports this module

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
