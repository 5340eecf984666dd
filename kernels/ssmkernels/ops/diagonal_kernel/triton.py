"""The kernel of a diagonal state-space model in Triton: the kernels' launches, and their place in autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.triton_support import all_registers, kernels, missing, on_device_of, wrong_device
from ssmkernels.ops.diagonal_kernel.modes import power_table, powers_summed, sum_of_powers

__all__ = ["diagonal_kernel", "missing", "offline_cases", "unsupported"]

FINE = 16  # entries of the finer table of powers: J in triton_kernels.py
TILE = 16  # blocks, and states, of one program


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    A = arguments["A"]
    if A.numel() == 0:
        return "no channels or no states"
    return wrong_device("A", A)


def diagonal_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    return sum_of_powers(_Taps.apply, A, B, C, dt, length, discretization)


class _Taps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ratio: Tensor, weight: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ratio, weight)
        ctx.constants = length, dtype
        return _forward(ratio, weight, length, dtype)

    @staticmethod
    @twice_differentiable(lambda ctx: (powers_summed, (*ctx.saved_tensors, *ctx.constants)))
    def backward(ctx: Any, dtaps: Tensor) -> tuple[Tensor | None, ...]:
        ratio, weight = ctx.saved_tensors
        return (*_backward(ratio, weight, dtaps.contiguous()), None, None)


def _forward(ratio: Tensor, weight: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    d = ratio.shape[0]
    taps = ratio.new_empty((d, length), dtype=dtype)
    if length:
        values, starts = _values(ratio, length, dtype)
        values |= _table("starts", starts * weight[..., None], dtype) | {"taps": taps}
        options = _options(length, 64)
        grid = (d, -(-values["blocks"] // TILE), options["R"] // options["I"])
        with on_device_of(ratio):
            kernels(__package__).forward[grid](**values, **options)
    return taps


def _backward(ratio: Tensor, weight: Tensor, dtaps: Tensor) -> tuple[Tensor, Tensor]:
    d, n = ratio.shape
    length, dtype = dtaps.shape[1], dtaps.dtype
    if not length:
        return torch.zeros_like(ratio), torch.zeros_like(weight)
    values, starts = _values(ratio, length, dtype)
    tiles = -(-values["blocks"] // TILE)
    parts = 2 if ratio.is_complex() else 1
    dratio, dweight = (dtaps.new_empty(parts, tiles, d, n) for _ in range(2))
    last = power_table(ratio, _block(length))[0][..., -1:]
    values |= _table("starts", starts, dtype) | {"last": _table("last", last, dtype)["last"]}
    values |= {"dtaps": dtaps, "dratio": dratio, "dweight": dweight, "found_part": tiles * d * n}
    options = _options(length, 16 if dtype == torch.float64 else 32)
    with on_device_of(ratio):
        kernels(__package__).backward[(d, tiles, -(-n // TILE))](**values, **options)
    totals = [found.sum(1, dtype=torch.float64) for found in (dratio, dweight)]
    if not ratio.is_complex():
        return totals[0][0] * weight, totals[1][0]
    dratio, dweight = (2 * torch.complex(re, -im) for re, im in totals)  # (d n), conjugated
    return dratio * weight.conj_physical(), dweight


def _block(length: int) -> int:
    """Taps of a block."""
    return 64 if length <= 4096 else 256


def _values(ratio: Tensor, length: int, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """What both kernels take, and the powers that blocks start from (d n blocks), in float64."""
    block, n = _block(length), ratio.shape[1]
    fine, leap = power_table(ratio, FINE)
    coarse, leap = power_table(leap, block // FINE)
    blocks = -(-length // block)
    starts, _ = power_table(leap, blocks)
    values = _table("fine", fine, dtype) | _table("coarse", coarse, dtype)
    return values | {"length": length, "blocks": blocks, "n": n, "COMPLEX": ratio.is_complex()}, starts


def _table(name: str, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """x (d n entries) as the kernels read it, (parts d entries n), and the size of a part."""
    x = x.mT
    parts = torch.stack([x.real, x.imag]) if x.is_complex() else x[None]
    return {name: parts.to(dtype).contiguous(), f"{name}_part": x.numel()}


def _options(length: int, steps: int) -> dict[str, Any]:
    """Launch settings: ``steps`` of a block at a time."""
    return {"R": _block(length), "Q": TILE, "I": steps, "N": TILE, "num_warps": 4, **all_registers()}


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, n: int, length: int, complex: bool) -> None:
        ratio = torch.empty(4, n, dtype=torch.complex128 if complex else torch.float64, device="meta")
        taps = _forward(ratio, ratio, length, dtype)
        _backward(ratio, ratio, taps)

    for dtype, n, length, complex in (
        (torch.float32, 32, 16384, True),
        (torch.float32, 5, 1000, True),
        (torch.float32, 64, 16384, False),
        (torch.float64, 32, 16384, True),
        (torch.float64, 7, 1000, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, n {n}, length {length}, {'complex' if complex else 'real'}"
        yield name, functools.partial(launches, dtype, n, length, complex)
