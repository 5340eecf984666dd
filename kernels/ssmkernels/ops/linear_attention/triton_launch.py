"""The launches of linear attention's Triton kernels."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import all_registers, kernels, next_power_of_2
from ssmkernels.core.validate import precision
from ssmkernels.ops.linear_attention.reference import scale_of

CHUNK = 64  # tokens between saved states
NUMBERS = 2048  # of a state that a program has in registers


def blocks(a: Any) -> tuple[int, int, int]:
    """Key channels and value channels of a program, and how many programs a head has."""
    k, v = a.k.shape[-1], a.v.shape[-1]
    block_k = next_power_of_2(k)
    block_v = min(next_power_of_2(v), max(8, NUMBERS // block_k))
    return block_k, block_v, -(-v // block_v)


def chunks(a: Any) -> Any:
    """How many states are saved. Packed, sequence i's start at number cu_seqlens[i] // CHUNK + i."""
    batch, length = a.q.shape[:2]
    return batch * -(-length // CHUNK) if a.cu_seqlens is None else length // CHUNK + a.cu_seqlens.shape[0] - 1


def launch(kernel: str, a: Any, batch_axes: int, sequences: int, **fields: Any) -> None:
    """Runs a kernel with a call's arguments, which have so many axes for batch and time, and ``fields``."""
    block_k, block_v, tiles = blocks(a)
    heads, v = a.v.shape[-2:]
    log_decay, wide = a.log_decay, precision(a.q)
    axes = 0 if log_decay is None else log_decay.ndim
    given = {"q": a.q, "k": a.k, "v": a.v, "decay": log_decay if axes > 1 else None}
    strides: dict[str, int] = {}
    for name, x in given.items():
        own = [0, 0, 0, 0] if x is None else list(x.stride())
        own += [0] * (batch_axes + 2 - len(own))
        if batch_axes == 1:
            own.insert(1, 0)
        strides |= {f"{name}_{axis}": s for axis, s in zip(("batch", "time", "head", "step"), own, strict=False)}
    if axes == 1:
        strides["decay_head"] = log_decay.stride(0)
    length = a.q.shape[1] if batch_axes == 2 else 1
    language = importlib.import_module("triton.language")
    programs = sequences * heads * tiles
    if programs:
        getattr(kernels(__package__), kernel)[(programs,)](
            q=a.q,
            k=a.k,
            v=a.v,
            log_decay=log_decay,
            bonus=None if a.bonus is None else a.bonus.contiguous(),
            **strides,
            **fields,
            length=length,
            per_sequence=-(-length // CHUNK),
            SCALE=float(scale_of(a.scale, a.k)),
            H=heads,
            GROUP=heads // a.k.shape[-2],
            K=a.k.shape[-1],
            V=v,
            DECAY=0 if log_decay is None else 1 if axes == 1 else axes - batch_axes + 1,
            WIDE=language.float64 if wide == torch.float64 else language.float32,
            CHUNK=CHUNK,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=4,
            **all_registers(),
        )


def plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
