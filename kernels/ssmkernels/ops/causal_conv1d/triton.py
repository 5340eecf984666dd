"""The causal convolution in Triton: the kernels' launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import all_registers, kernels, missing, on_device_of, owners
from ssmkernels.core.validate import precision
from ssmkernels.ops.causal_conv1d import triton_step as step
from ssmkernels.ops.causal_conv1d.triton_step import Dims, block_of, unsupported, warps_of

__all__ = ["backward", "forward", "missing", "offline_cases", "unsupported"]


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor]:
    x, s = a.x, a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    y = x.new_empty(x.shape)
    final_state = x.new_empty((s, a.weight.shape[1] - 1, x.shape[2]), dtype=precision(x))
    programs, values, options = _launch(a, forward=True)
    if programs:
        with on_device_of(x):
            kernels(__package__).forward[(programs,)](**values, y=y, final=final_state, **options)
    return y, final_state


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Any]:
    x, initial_state, dy, dfinal = a.x, a.initial_state, grads.y, grads.final_state
    programs, values, options = _launch(a, forward=False)
    d, w = a.weight.shape
    dx = x.new_empty(x.shape)
    dinitial = None if initial_state is None else x.new_empty(initial_state.shape, dtype=initial_state.dtype)
    tiles = programs // options["d_blocks"] if programs else 0
    parts = x.new_empty((tiles, w + 1, d), dtype=precision(x))
    if programs:
        values |= {
            "dy": strided(dy),
            "dfinal": None if dfinal is None else dfinal.contiguous(),
            "dx": dx,
            "dinitial": dinitial,
            "dweights": parts,
        }
        with on_device_of(x):
            kernels(__package__).backward[(programs,)](**values, **options)
    total = parts.sum(0)
    return {
        "x": dx,
        "weight": total[:w].T.to(a.weight.dtype, memory_format=torch.contiguous_format, copy=True),
        "bias": total[w].clone(),  # out of the memory of the weight's
        "initial_state": dinitial,
    }


def _launch(a: Any, forward: bool) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The number of programs, what both kernels take of the arguments, and how they are laid out."""
    x, weight, bias, initial_state, cu_seqlens = a.x, a.weight, a.bias, a.initial_state, a.cu_seqlens
    b, length, d = x.shape
    w = weight.shape[1]
    block = block_of(d)
    T = 16 if w <= 4 and x.dtype != torch.float64 else 8
    d_blocks = -(-d // block)
    tiles = max(1, -(-length // T))
    owner = None if cu_seqlens is None else owners(cu_seqlens, length, T)
    programs = d_blocks * (b * tiles if owner is None else len(owner))
    values: dict[str, Any] = {
        "x": strided(x),
        "weight": strided(weight),
        "bias": strided(bias),
        "initial": strided(initial_state),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "owners": owner,
    }
    options = {
        "length": length,
        "tiles": tiles,
        "d": d,
        "d_blocks": d_blocks,
        "dims": Dims(w, a.activation == "silu", T, block),
        **all_registers(),
        "num_warps": warps_of(block, 2 if forward and x.dtype != torch.float64 else 1),
    }
    return programs, values, options


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, w: int, packed: bool, plain: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, weight, wide = meta(1, 64, 512), meta(512, w), precision(meta(1))
        bias, initial = (None, None) if plain else (meta(512), meta(3 if packed else 1, w - 1, 512, dtype=wide))
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        activation = None if plain else "silu"
        Conv, Step = (OPS[name].declared.Arguments for name in ("causal_conv1d", "causal_conv1d_step"))
        a = Conv(x, weight, bias, activation, initial, cu_seqlens)
        _, final = forward(a, True)
        backward(a, None, SimpleNamespace(y=x, final_state=None if plain else final))
        step.forward(Step(meta(1, w - 1, 512, dtype=wide), x[:, 0], weight, bias, activation), False)

    for dtype, w, packed, plain in (
        (torch.float32, 4, False, False),
        (torch.bfloat16, 4, True, False),
        (torch.float16, 2, False, True),
        (torch.float64, 4, False, False),
        (torch.float32, 7, False, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, width {w}" + ", packed" * packed + ", plain" * plain
        yield name, functools.partial(launches, dtype, w, packed, plain)
