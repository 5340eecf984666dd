"""Attention in Triton: what it can run, and its forward pass's launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import kernels, missing, on_device_of, wrong_device
from ssmkernels.core.validate import precision
from ssmkernels.ops.attention.triton_arguments import lacking, options, places, query_lists, settled, values
from ssmkernels.ops.attention.triton_backward import backward

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "offline_cases", "unsupported"]

SAVES = ("out", "lse")


def unsupported(a: Any) -> str | None:
    return lacking(a.q, a.v) or wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor]:
    out, lse = empty(a, save)
    fields = values(a)
    own = options("forward", fields)
    tiles, where = places(a.cu_seqlens, a.q.shape[1], fields["MASK_Q"], own["ROWS"])
    if out.numel():
        with on_device_of(a.q):
            kernels(__package__).forward[(tiles * a.q.shape[2] * a.q.shape[0],)](
                **settled(fields, own),
                **where,
                **query_lists(a),
                sinks=None if a.sinks is None else a.sinks.contiguous(),
                out=out,
                lse=lse,
                tiles=tiles,
            )
    return out, lse


def empty(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    """The log-sum-exp is there even where nobody wants it: the backward pass does."""
    b, l, h, _k = a.q.shape
    return a.q.new_empty(b, l, h, a.v.shape[3]), a.q.new_empty((b, h, l), dtype=precision(a.q))


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(
        dtype: torch.dtype, k: int, v: int, block: int, packed: bool, biases: bool, positions: bool = False
    ) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        tensors: list[Any] = [meta(1, 2048, 8, k), meta(1, 2048, 2, k), meta(1, 2048, 2, v)]
        tensors += [meta(8, dtype=torch.float32), meta(8)] if biases else [None, None]
        constants = (1000 if biases else -1, -1 if block else 0, 0.1, 30.0 * biases)
        masks: list[Any] = [None] * 4
        if block:
            shapes = (1, -(-2048 // block) + 1), (99,), (99,)
            masks = [meta(*shape, dtype=torch.int32) for shape in shapes]
            masks.append(meta(7, block, block // 8, dtype=torch.uint8))
        masks += [meta(5, dtype=torch.int32) if packed else None] * 2
        masks += [meta(1, 2048, dtype=torch.int32) if positions else None] * 2
        a = OPS["attention"].declared.Arguments(*tensors, *constants, *masks, biases)
        out, lse = forward(a, True)
        wanted = ["alibi_slopes"] if biases else []
        grads = SimpleNamespace(out=out, lse=lse if biases else None, wanted=wanted)
        backward(a, SimpleNamespace(out=out, lse=lse), grads)

    cases: tuple[tuple[torch.dtype, int, int, int, bool, bool], ...] = (
        (torch.bfloat16, 64, 64, 0, False, False),
        (torch.bfloat16, 64, 64, 64, False, False),
        (torch.bfloat16, 128, 128, 0, False, False),
        (torch.bfloat16, 128, 128, 0, True, True),
        (torch.bfloat16, 128, 128, 128, True, False),
        (torch.float16, 96, 33, 24, False, False),
        (torch.bfloat16, 256, 256, 0, False, False),
        (torch.bfloat16, 256, 256, 128, False, False),
        (torch.bfloat16, 64, 64, 64, True, True),
        (torch.bfloat16, 128, 128, 128, True, True),
        (torch.bfloat16, 256, 256, 128, True, True),
        (torch.float32, 64, 64, 0, True, True),
        (torch.float32, 64, 64, 64, True, True),
        (torch.float32, 128, 128, 64, False, False),
        (torch.float32, 256, 256, 0, False, False),
    )
    placed: tuple[tuple[torch.dtype, int, int, int, bool, bool], ...] = (
        (torch.bfloat16, 64, 64, 0, True, False),
        (torch.bfloat16, 128, 128, 128, True, True),
        (torch.float32, 64, 64, 0, False, True),
        (torch.bfloat16, 256, 256, 0, True, False),
    )
    for positions, (dtype, k, v, block, packed, biases) in (*((False, c) for c in cases), *((True, c) for c in placed)):
        name = f"{str(dtype).removeprefix('torch.')}, k {k}, v {v}" + f", mask of blocks of {block}" * bool(block)
        name += ", packed" * packed + ", biases" * biases + ", positions" * positions
        yield name, functools.partial(launches, dtype, k, v, block, packed, biases, positions)
