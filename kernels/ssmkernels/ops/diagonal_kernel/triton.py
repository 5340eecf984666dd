"""The kernel of a diagonal state-space model in Triton: the kernels' launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.gradient import with_gradient
from ssmkernels.core.triton_support import all_registers, kernels, missing, on_device_of, wrong_device
from ssmkernels.ops.diagonal_kernel.modes import Powers, power_table, powers_summed, sum_of_powers

__all__ = ["compute", "missing", "offline_cases", "unsupported"]

FINE = 16  # entries of the finer table of powers: J in triton_kernels.py
TILE = 16  # blocks, and states, of one program


def unsupported(a: Any) -> str | None:
    return "no channels or no states" if a.A.numel() == 0 else wrong_device(a)


def compute(a: Any) -> Tensor:
    return sum_of_powers(_taps, a)


def _forward(a: Powers) -> Tensor:
    d = a.ratio.shape[0]
    taps = a.ratio.new_empty((d, a.length), dtype=a.dtype)
    if a.length:
        values, starts = _values(a)
        values |= _table("starts", starts * a.weight[..., None], a.dtype) | {"taps": taps}
        options = _options(a.length, 64)
        grid = (d, -(-values["blocks"] // TILE), options["R"] // options["I"])
        with on_device_of(a.ratio):
            kernels(__package__).forward[grid](**values, **options)
    return taps


def _backward(a: Powers, dtaps: Tensor, _: set[str]) -> dict[str, Tensor]:
    ratio, weight, dtaps = a.ratio, a.weight, dtaps.contiguous()
    if not a.length:
        return {"ratio": torch.zeros_like(ratio), "weight": torch.zeros_like(weight)}
    d, n = ratio.shape
    values, starts = _values(a)
    tiles = -(-values["blocks"] // TILE)
    parts = 2 if ratio.is_complex() else 1
    dratio, dweight = (dtaps.new_empty(parts, tiles, d, n) for _ in range(2))
    last = power_table(ratio, _block(a.length))[0][..., -1:]
    values |= _table("starts", starts, a.dtype) | {"last": _table("last", last, a.dtype)["last"]}
    values |= {"dtaps": dtaps, "dratio": dratio, "dweight": dweight, "found_part": tiles * d * n}
    options = _options(a.length, 16 if a.dtype == torch.float64 else 32)
    with on_device_of(ratio):
        kernels(__package__).backward[(d, tiles, -(-n // TILE))](**values, **options)
    totals = [found.sum(1, dtype=torch.float64) for found in (dratio, dweight)]
    if not ratio.is_complex():
        return {"ratio": totals[0][0] * weight, "weight": totals[1][0]}
    dratio, dweight = (2 * torch.complex(re, -im) for re, im in totals)  # (d n), conjugated
    return {"ratio": dratio * weight.conj_physical(), "weight": dweight}


_taps = with_gradient(_forward, _backward, powers_summed)


def _block(length: int) -> int:
    """Taps of a block."""
    return 64 if length <= 4096 else 256


def _values(a: Powers) -> tuple[dict[str, Any], Tensor]:
    """What both kernels take, and the powers that blocks start from (d n blocks), in float64."""
    block = _block(a.length)
    fine, leap = power_table(a.ratio, FINE)
    coarse, leap = power_table(leap, block // FINE)
    blocks = -(-a.length // block)
    starts, _ = power_table(leap, blocks)
    values = _table("fine", fine, a.dtype) | _table("coarse", coarse, a.dtype)
    sizes = {"length": a.length, "blocks": blocks, "n": a.ratio.shape[1], "COMPLEX": a.ratio.is_complex()}
    return values | sizes, starts


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
        a = Powers(ratio, ratio, length, dtype)
        _backward(a, _forward(a), {"ratio", "weight"})

    for dtype, n, length, complex in (
        (torch.float32, 32, 16384, True),
        (torch.float32, 5, 1000, True),
        (torch.float32, 64, 16384, False),
        (torch.float64, 32, 16384, True),
        (torch.float64, 7, 1000, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, n {n}, length {length}, {'complex' if complex else 'real'}"
        yield name, functools.partial(launches, dtype, n, length, complex)
