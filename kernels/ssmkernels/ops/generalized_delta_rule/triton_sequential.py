"""The general delta rule in Triton, token after token: its step, float64, and keys too wide for chunks in registers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import all_registers, kernels, next_power_of_2, on_device_of
from ssmkernels.core.validate import precision
from ssmkernels.ops.generalized_delta_rule.cpu_arguments import ACTIVATIONS, segment_length
from ssmkernels.ops.generalized_delta_rule.reference import scale_of

WARPS = {"forward": 4, "backward": 8}  # the latter has four times as much in registers
NUMBERS = 2048  # of a state that a program has in registers, in float32


def forward(a: Any, o: Tensor, final_state: Tensor, starts: Tensor, save: bool) -> None:
    initial = None if a.initial_state is None else a.initial_state.contiguous()
    launch("forward", a, initial=initial, o=o, final=final_state, starts=starts, SAVE=save)


def launch(kernel: str, a: Any, **given: Any) -> None:
    """A program for each sequence, head and block of values; ``given`` is what the two kernels do not share."""
    dims, programs = _sizes(a)
    if programs:
        tensors = {name: strided(getattr(a, name)) for name in ACTIVATIONS} | {"decay": strided(a.log_decay)}
        with on_device_of(a.q):
            getattr(kernels(__package__), kernel)[(programs,)](
                **tensors,
                **given,
                dims=dims,
                cu_seqlens=a.cu_seqlens,
                scale=scale_of(a.q, a.scale),
                T=a.q.shape[1],
                num_warps=WARPS[kernel],
                **all_registers(),
            )


def backward(a: Any, starts: Tensor, grads: Any) -> dict[str, Tensor | None]:
    wide = precision(a.q)
    dims, programs = _sizes(a)
    tiles = -(-dims.V // dims.BLOCK_V)
    parts = {name: a.q.new_empty(tiles, *a.q.shape, dtype=wide) for name in ("q", "k", "a", "b", "log_decay")}
    dv = a.v.new_empty(a.v.shape)
    d_initial = a.q.new_empty(_sequences(a), *starts.shape[1:], dtype=wide)
    launch(
        "backward",
        a,
        starts=starts,
        states=a.q.new_empty(programs, dims.SEGMENT, dims.BLOCK_K, dims.BLOCK_V, dtype=wide),
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


def _sequences(a: Any) -> int:
    """How many there are."""
    return a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1


class Dims(NamedTuple):
    """The constants of both kernels: tokens between saved states, heads, their channels, and those of a program."""

    SEGMENT: int
    H: int
    K: int
    V: int
    BLOCK_K: int
    BLOCK_V: int


def _sizes(a: Any) -> tuple[Dims, int]:
    """The constants, and the number of programs."""
    (heads, k), v = a.q.shape[2:], a.v.shape[3]
    block_k = next_power_of_2(k)
    block_v = min(next_power_of_2(v), max(1, (NUMBERS if a.q.dtype != torch.float64 else NUMBERS // 2) // block_k))
    return Dims(segment_length(k, v), heads, k, v, block_k, block_v), _sequences(a) * heads * -(-v // block_v)
