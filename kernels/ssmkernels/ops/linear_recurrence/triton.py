"""The linear recurrence in Triton: what it can run, and its launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing, on_device_of, wrong_device
from ssmkernels.ops.linear_recurrence import triton_step
from ssmkernels.ops.linear_recurrence.saved import SAVES, empty
from ssmkernels.ops.linear_recurrence.triton_launch import Chunks, contiguous, launch, numbers, strides

__all__ = ["SAVES", "backward", "forward", "missing", "offline_cases", "unsupported"]


def unsupported(a: Any) -> str | None:
    return "no channels" if a.b.shape[2] == 0 else wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    h, final_state, states = empty(a, save)
    launch(a, h, final_state, states if states.numel() else None)
    return h, final_state, states


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Any]:
    call = Chunks(a)
    states = saved.states if saved.states.dtype != a.b.dtype else saved.h
    fixed, d = a.a.ndim == 1, a.b.shape[2]
    da = a.a.new_empty((call.count, d) if fixed else a.b.shape, dtype=_sums(a.a, states) if fixed else a.a.dtype)
    db, dinitial = a.b.new_empty(a.b.shape), states.new_empty(call.sequences, d)
    dh = numbers(grads.h)
    with on_device_of(a.b):
        call.run(
            "backward",
            call.count,
            states=numbers(states.contiguous()),
            initial=contiguous(a.initial_state),
            dh=dh,
            **strides("dh", dh),
            after=call.carried(dh, contiguous(grads.final_state), states.dtype, reverse=True),
            da=numbers(da),
            db=numbers(db),
            dinitial=numbers(dinitial),
            FIXED=fixed,
        )
    return {
        "a": da.sum(0) if fixed else da,
        "b": db,
        "initial_state": None if a.initial_state is None else dinitial,
    }


def _sums(a: Tensor, states: Tensor) -> torch.dtype:
    """The dtype of sums over a: that of the states, complex where a is."""
    return states.dtype if a.is_complex() or not states.is_complex() else states.real.dtype


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, decay: torch.dtype, option: str) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        length, packed = 300 if option else 64, option == "packed"  # several chunks, or one
        b = meta(1, length, 512)
        a = meta(512, dtype=decay) if option == "fixed" else meta(1, length, 512, dtype=decay)
        s = 3 if packed else 1
        initial = meta(s, 512, dtype=torch.promote_types(dtype, torch.float32))
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        call = OPS["linear_recurrence"].declared.Arguments(a, b, option == "log", initial, cu_seqlens)
        h, final, states = forward(call, True)
        backward(call, SimpleNamespace(h=h, states=states), SimpleNamespace(h=h, final_state=final))
        Step = OPS["linear_recurrence_step"].declared.Arguments
        triton_step.forward(Step(initial[:1], a if option == "fixed" else a[:, 0], b[:, 0], option == "log"), False)

    for dtype, decay, option in (
        (torch.float32, torch.float32, "log"),
        (torch.bfloat16, torch.float32, "packed"),
        (torch.float16, torch.float16, "fixed"),
        (torch.complex64, torch.complex64, "log"),
        (torch.complex64, torch.float32, "packed"),
        (torch.float64, torch.float64, ""),
    ):
        name = ", ".join(str(kind).removeprefix("torch.") for kind in (dtype, decay)) + f", {option}" * bool(option)
        yield name, functools.partial(launches, dtype, decay, option)
