"""The gates of the real-gated linear recurrent unit in Triton: what it can run, and its launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.core.validate import precision
from ssmkernels.native import plain, rows

__all__ = ["backward", "forward", "missing", "offline_cases", "unsupported"]

BLOCK, TOKENS = 256, 64  # channels of a program, and tokens that it sums over in the backward pass


def unsupported(a: Any) -> str | None:
    return "no heads or channels" if 0 in a.x.shape[2:] else wrong_device(a)


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    decay, inputs = a.declared.outputs(a)
    _launch("forward", a, a.x.shape[0] * a.x.shape[1], {"a": decay, "b": inputs})
    return decay, inputs


def backward(a: Any, _: Any, grads: Any) -> dict[str, Any]:
    x, wide, tokens = a.x, precision(a.x), a.x.shape[0] * a.x.shape[1]
    parts = -(-tokens // TOKENS)
    found = {
        "x": x.new_empty(x.shape),
        "gates": x.new_empty(a.gates.shape),
        "log_decay": x.new_empty((parts, *a.log_decay.shape), dtype=wide),
    }
    fields = {
        "da": plain(grads.a, wide),
        "db": x.new_zeros(x.shape) if grads.b is None else plain(grads.b, x.dtype),
        **{f"d{name}": gradient for name, gradient in found.items()},
        "rows": tokens,
        "TOKENS": TOKENS,
    }
    _launch("backward", a, parts, fields)
    return {**found, "log_decay": found["log_decay"].sum(0)}


def _launch(kernel: str, a: Any, programs: int, fields: dict[str, Any]) -> None:
    """Runs a kernel of so many programs for each block of a head's channels."""
    x, gates = rows(a.x), rows(a.gates)
    h, p = x.shape[2:]
    block = min(BLOCK, next_power_of_2(p))
    if programs:
        with on_device_of(x):
            getattr(kernels(__package__), kernel)[(programs * h * -(-p // block),)](
                x=strided(x),
                gates=strided(gates),
                log_decay=plain(a.log_decay, precision(x)),
                first=None if a.first is None else a.first.contiguous(),
                length=x.shape[1],
                H=h,
                P=p,
                BLOCK=block,
                num_warps=2,
                **fields,
            )


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, p: int, begins: bool) -> None:
        x = torch.empty(1, 64, 4, p, dtype=dtype, device="meta")
        decay = torch.empty(4, p, dtype=torch.promote_types(dtype, torch.float32), device="meta")
        first = torch.empty(1, 64, dtype=torch.int32, device="meta") if begins else None
        a = OPS["rglru_gates"].declared.Arguments(x, x.repeat(1, 1, 1, 2), decay, first)
        decay, inputs = forward(a, True)
        backward(a, None, SimpleNamespace(a=decay, b=inputs))

    for dtype, p, begins in ((torch.float32, 96, True), (torch.bfloat16, 256, True), (torch.float64, 33, False)):
        yield f"{str(dtype).removeprefix('torch.')}, p {p}", functools.partial(launches, dtype, p, begins)
