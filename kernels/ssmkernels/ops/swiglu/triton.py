"""The gated product in Triton: its launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import all_registers, kernels, missing, next_power_of_2, on_device_of
from ssmkernels.core.triton_support import wrong_device as unsupported
from ssmkernels.native import lines

__all__ = ["backward", "forward", "missing", "offline_cases", "unsupported"]

TILE, BLOCK = 1024, 512  # numbers of a program, and at most so many of one row


def forward(a: Any, _: bool) -> Tensor:
    y = a.gate.new_empty(a.gate.shape)
    _launch("forward", a, y=y)
    return y


def backward(a: Any, _: Any, grads: Any) -> dict[str, Any]:
    dgate, dup = a.gate.new_empty(a.gate.shape), a.gate.new_empty(a.gate.shape)
    _launch("backward", a, dy=strided(lines(grads.y)), dgate=dgate, dup=dup)
    return {"gate": dgate, "up": dup}


def _launch(kernel: str, a: Any, **fields: Any) -> None:
    gate, up = lines(a.gate), lines(a.up)
    rows, d = gate.shape
    block = min(BLOCK, next_power_of_2(d))
    here = TILE // block
    programs = -(-rows // here) * -(-d // block)
    if programs:
        with on_device_of(gate):
            getattr(kernels(__package__), kernel)[(programs,)](
                gate=strided(gate),
                up=strided(up),
                rows=rows,
                D=d,
                SCALE=float(a.scale),
                ROWS=here,
                BLOCK=block,
                **all_registers(),
                **fields,
            )


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, d: int) -> None:
        gate, up = torch.empty(64, 2 * d, dtype=dtype, device="meta").chunk(2, -1)
        a = OPS["swiglu"].declared.Arguments(gate, up, 1.0)
        backward(a, None, SimpleNamespace(y=forward(a, True)))

    for dtype, d in ((torch.float32, 1024), (torch.bfloat16, 1024), (torch.float16, 96), (torch.float64, 33)):
        yield f"{str(dtype).removeprefix('torch.')}, d {d}", functools.partial(launches, dtype, d)
