"""Root-mean-square normalisation in Triton: what it can run, and its launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import all_registers, kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.core.validate import precision
from ssmkernels.native import lines, plain

__all__ = ["backward", "forward", "missing", "offline_cases", "unsupported"]

TILE = 1024  # numbers of a program, where a group does not have more
PART = 64  # rows of a program in the backward pass
WIDEST = 8192  # channels of a group, which a program has in registers


class Dims(NamedTuple):
    """The constants of the kernels, in one argument.

    Attributes:
        D, GROUP: channels, and those of a group.
        ROWS, BLOCK: what a program takes at once.
        GATE_FIRST: whether the gate comes before the norm.
        EPS: added to the mean of squares; a constant of a model.
    """

    D: int
    GROUP: int
    ROWS: int
    BLOCK: int
    GATE_FIRST: bool
    EPS: float


def unsupported(a: Any) -> str | None:
    d = a.x.shape[-1]
    widest = WIDEST // 4 if a.x.dtype == torch.float64 else WIDEST
    if (a.group_size or d) > widest:
        return f"means over more than {widest} channels"
    return "no channels" if d == 0 else wrong_device(a)


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    y = a.x.new_empty(a.x.shape)
    none = a.residual is None
    summed = a.x.new_empty(0, dtype=precision(a.x)) if none else a.residual.new_empty(a.residual.shape)
    _launch("forward", a, 1, y=y, summed=None if none else summed)
    return y, summed


def backward(a: Any, _: Any, grads: Any) -> dict[str, Any]:
    x, gate, residual = a.x, a.gate, a.residual
    parts = -(-x.shape[:-1].numel() // PART)
    found = {
        "x": x.new_empty(x.shape),
        "gate": None if gate is None else gate.new_empty(gate.shape),
        "residual": None if residual is None else residual.new_empty(residual.shape),
    }
    sums = x.new_empty((parts, x.shape[-1]), dtype=precision(x))
    given = {"dy": grads.y, "dsummed": None if residual is None else grads.summed}
    fields = {name: strided(lines(grad)) for name, grad in given.items()}
    fields |= {f"d{name}": gradient for name, gradient in found.items()}
    _launch("backward", a, PART, **fields, parts=sums, PART=PART)
    return {**found, "weight": sums.sum(0)}


def _launch(kernel: str, a: Any, rows_of_program: int, **fields: Any) -> None:
    """Runs a kernel whose programs take at least so many rows each."""
    x, gate, residual = (strided(lines(t)) for t in (a.x, a.gate, a.residual))
    d = a.x.shape[-1]
    rows, group = a.x.shape[:-1].numel(), a.group_size or d
    block = next_power_of_2(group)
    here = max(1, min(PART, TILE // block))
    tiles, warps = -(-rows // max(here, rows_of_program)), max(1, min(16, here * block // 256))
    if tiles:
        with on_device_of(a.x):
            getattr(kernels(__package__), kernel)[(tiles * (d // group),)](
                x=x,
                weight=plain(a.weight, precision(a.x)),
                gate=gate,
                residual=residual,
                rows=rows,
                dims=Dims(d, group, here, block, not a.norm_before_gate, float(a.eps)),
                num_warps=warps,
                num_stages=1,
                **all_registers(32 * warps),
                **fields,
            )


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, d: int, group: int | None, before: bool, alone: bool) -> None:
        x, gate = torch.empty(64, 2 * d, dtype=dtype, device="meta").chunk(2, -1)
        weight, residual = x.new_empty(d), x.new_empty((64, d), dtype=precision(x))
        more = (None, True, group, None) if alone else (gate, before, group, residual)
        a = OPS["rms_norm"].declared.Arguments(x, weight, 1e-5, *more)
        y, summed = forward(a, True)
        backward(a, None, SimpleNamespace(y=y, summed=summed))

    for dtype, d, group, before, alone in (
        (torch.float32, 768, None, True, True),
        (torch.bfloat16, 4096, None, True, False),
        (torch.bfloat16, 8192, 1024, False, False),
        (torch.float16, 96, 12, False, False),
        (torch.float32, 8192, None, False, False),
        (torch.float64, 2048, None, True, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, d {d}, groups of {group}, gate after {before}, alone {alone}"
        yield name, functools.partial(launches, dtype, d, group, before, alone)
