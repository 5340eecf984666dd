"""The selective scan in Triton: what it can run, and its forward pass's launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import kernels, missing, on_device_of
from ssmkernels.core.validate import precision
from ssmkernels.ops.selective_scan import triton_step as step
from ssmkernels.ops.selective_scan.triton_arguments import chunk_length, count_groups, forward_options, settled, values
from ssmkernels.ops.selective_scan.triton_backward import backward
from ssmkernels.ops.selective_scan.triton_step import unsupported

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "offline_cases", "unsupported"]

SAVES = ("starts",)  # the states before each chunk, (chunks d n)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, final_state, starts = empty(a, save)
    n, groups = a.A.shape[1], count_groups(a.B, a.C)
    per_group = a.A.shape[0] // groups
    options = forward_options(n, per_group, a.u.dtype)
    blocks = -(-per_group // options["BLOCK_D"])
    programs = final_state.shape[0] * groups * blocks
    if programs:
        fields = values(a, groups)
        fields |= {
            "initial": None if a.initial_state is None else a.initial_state.contiguous(),
            "starts": starts if save else None,
            "y": y,
            "final": final_state,
            "blocks": blocks,
            "d_blocks": groups * blocks,
            "zero": 0,
        }
        with on_device_of(a.u):
            kernels(__package__).forward[(programs,)](**settled(fields | options))
    return y, final_state, starts


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, A = a.u, a.A
    s = u.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    chunk, wide = chunk_length(A.shape[1]), precision(u)
    # Packed, sequence i's chunks have the numbers from cu_seqlens[i] // chunk + i on; some belong to no sequence
    chunks = s * -(-u.shape[1] // chunk) if a.cu_seqlens is None else u.shape[1] // chunk + s
    return (
        u.new_empty(u.shape),
        u.new_empty((s, *A.shape), dtype=wide),
        (u.new_empty if a.cu_seqlens is None else u.new_zeros)((chunks if save else 0, *A.shape), dtype=wide),
    )


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, n: int, packed: bool, fixed: bool, plain: bool, strided: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        wide = precision(meta(1))
        x, A, vector = meta(1, 64, 512), meta(512, n, dtype=wide), meta(512, dtype=wide)
        B = A if fixed else meta(1, 64, 2, n)
        if strided:
            x, B = meta(1, 64, 1024)[..., ::2], meta(1, 64, 2, 2 * n)[..., ::2]
        D, z, bias = (None, None, None) if plain else (vector, x, vector)
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        initial = None if plain else meta(3 if packed else 1, 512, n, dtype=wide)
        Scan, Step = (OPS[name].declared.Arguments for name in ("selective_scan", "selective_scan_step"))
        a = Scan(x, x, A, B, B, D, z, bias, not plain, initial, cu_seqlens)
        _, final, starts = forward(a, True)
        backward(a, SimpleNamespace(starts=starts), SimpleNamespace(y=x, final_state=None if plain else final))
        if not fixed:
            z = None if z is None else z[:, 0]
            step.forward(Step(final[:1], x[:, 0], x[:, 0], A, B[:, 0], B[:, 0], D, z, bias, not plain), False)

    for dtype, n, option in (
        (torch.float32, 16, ""),
        (torch.bfloat16, 16, "packed"),
        (torch.bfloat16, 16, "fixed maps"),
        (torch.float16, 17, "plain"),
        (torch.float32, 64, "strided"),
        (torch.bfloat16, 256, ""),
        (torch.float64, 16, ""),
    ):
        flags = (option == "packed", option == "fixed maps", option == "plain", option == "strided")
        name = f"{str(dtype).removeprefix('torch.')}, n {n}{', ' * bool(option)}{option}"
        yield name, functools.partial(launches, dtype, n, *flags)
