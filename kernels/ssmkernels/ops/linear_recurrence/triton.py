"""The linear recurrence in Triton: what it can run, and its launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import kernels, missing, on_device_of, wrong_device
from ssmkernels.ops.linear_recurrence.saved import SAVES, empty

__all__ = ["SAVES", "backward", "empty", "forward", "launch", "missing", "offline_cases", "unsupported"]

OPTIONS = {"T": 8, "BLOCK_D": 64, "num_warps": 2}


def unsupported(a: Any) -> str | None:
    return "no channels" if a.b.shape[2] == 0 else wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    h, final_state, states = empty(a, save)
    launch(a, h, final_state, states if states.numel() else None)
    return h, final_state, states


def launch(a: Any, h: Tensor, final_state: Tensor, states: Tensor | None) -> None:
    """Fills these; the final state may lie where the initial one does."""
    fields, programs = _fields(a)
    fields |= {"b": _numbers(a.b), "h": _numbers(h), "final": _numbers(final_state), "states": states}
    fields |= _strides("b", fields["b"])
    if programs:
        with on_device_of(a.b):
            kernels(__package__).forward[(programs,)](**fields, **OPTIONS)


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Any]:
    fields, programs = _fields(a)
    states = saved.states if saved.states.dtype != a.b.dtype else saved.h
    fixed, s = a.a.ndim == 1, programs // fields["d_blocks"]
    da = a.a.new_empty((s, a.b.shape[2]) if fixed else a.b.shape, dtype=_sums(a.a, states) if fixed else a.a.dtype)
    db, dinitial = a.b.new_empty(a.b.shape), states.new_empty(s, a.b.shape[2])
    dh = _numbers(grads.h)
    fields |= {"states": _numbers(states.contiguous()), "dh": dh, **_strides("dh", dh), "FIXED": fixed}
    fields |= {"dfinal": None if grads.final_state is None else _numbers(grads.final_state.contiguous())}
    fields |= {"da": _numbers(da), "db": _numbers(db), "dinitial": _numbers(dinitial)}
    if programs:
        with on_device_of(a.b):
            kernels(__package__).backward[(programs,)](**fields, **OPTIONS)
    return {
        "a": da.sum(0) if fixed else da,
        "b": db,
        "initial_state": None if a.initial_state is None else dinitial,
    }


def _fields(a: Any) -> tuple[dict[str, Any], int]:
    """What both kernels take, and how many programs there are."""
    decay = _numbers(torch.exp(a.a) if a.log_a and a.a.is_complex() else a.a)
    s = a.b.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    blocks = -(-a.b.shape[2] // OPTIONS["BLOCK_D"])
    fixed = a.a.ndim == 1
    fields = {
        "a": decay,
        "initial": None if a.initial_state is None else _numbers(a.initial_state.contiguous()),
        "cu_seqlens": a.cu_seqlens,
        "length": a.b.shape[1],
        "d_blocks": blocks,
        "d": a.b.shape[2],
        "COMPLEX": a.b.is_complex(),
        "COMPLEX_A": a.a.is_complex(),
        "LOG": a.log_a,
    }
    fields |= {"a_batch": 0, "a_time": 0, "a_d": decay.stride(0)} if fixed else _strides("a", decay)
    return fields, s * blocks


def _numbers(x: Tensor) -> Tensor:
    """A complex tensor as a real one with an axis more, of real and imaginary part."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(("batch", "time", "d"))}


def _sums(a: Tensor, states: Tensor) -> torch.dtype:
    """The dtype of sums over a: that of the states, complex where a is."""
    return states.dtype if a.is_complex() or not states.is_complex() else states.real.dtype


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, decay: torch.dtype, option: str) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        b, packed = meta(1, 64, 512), option == "packed"
        a = meta(512, dtype=decay) if option == "fixed" else meta(1, 64, 512, dtype=decay)
        s = 3 if packed else 1
        initial = meta(s, 512, dtype=torch.promote_types(dtype, torch.float32))
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        call = OPS["linear_recurrence"].declared.Arguments(a, b, option == "log", initial, cu_seqlens)
        h, final, states = forward(call, True)
        backward(call, SimpleNamespace(h=h, states=states), SimpleNamespace(h=h, final_state=final))

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
