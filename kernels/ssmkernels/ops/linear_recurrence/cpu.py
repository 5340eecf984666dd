"""The linear recurrence in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, rows
from ssmkernels.native import wrong_device as unsupported
from ssmkernels.ops.linear_recurrence.saved import SAVES, empty

__all__ = ["SAVES", "backward", "empty", "fields_of", "forward", "missing", "unsupported"]


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    fields, _kept = fields_of(a)
    h, final_state, states = empty(a, save)
    large_pages(h, states)
    fields |= {"h": h.data_ptr(), "final_state": final_state.data_ptr(), "states": states.data_ptr()}
    native.run("linear_recurrence", fields)
    return h, final_state, states


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Any]:
    fields, (decay, b, initial, *_kept) = fields_of(a)
    dh, dfinal = rows(grads.h), None if grads.final_state is None else grads.final_state.contiguous()
    states = saved.states if saved.states.dtype != b.dtype else saved.h.contiguous()
    s, d = fields["sequences"], b.shape[2]
    fixed = a.a.ndim == 1
    da = states.new_empty(s, d) if fixed else decay.new_empty(b.shape)
    db = b.new_empty(b.shape)
    dinitial = states.new_empty(s, d)
    large_pages(da, db)
    numbers = 2 if b.is_complex() else 1
    fields |= {"h": 0, "final_state": 0, "states": states.data_ptr(), "dh": dh.data_ptr(), "dfinal": address(dfinal)}
    fields |= {"da": da.data_ptr(), "db": db.data_ptr(), "dinitial": dinitial.data_ptr()}
    fields |= {"dh_batch": numbers * dh.stride(0), "dh_time": numbers * dh.stride(1)}
    native.run("linear_recurrence_backward", fields)
    if fixed:
        da = da.sum(0) * decay.conj() if a.log_a else da.sum(0)
    return {
        "a": da if a.a.is_complex() or not da.is_complex() else da.real,
        "b": db,
        "initial_state": None if initial is None else dinitial,
    }


def fields_of(a: Any) -> tuple[dict[str, int], list[Any]]:
    """The kernel's arguments except the outputs, and the tensors that they point into: decay, b, state, borders.

    Of logarithms the kernel takes the exponential of real ones alone, and none of a fixed decay.
    """
    wide, b = precision(a.b), rows(a.b.resolve_conj())
    fixed, numbers = a.a.ndim == 1, 2 if b.is_complex() else 1
    decay = a.a.to(wide) if fixed and not a.a.is_complex() else a.a.resolve_conj()
    if a.log_a and (fixed or b.is_complex()):
        decay = _exp(decay)
    if b.is_complex():
        decay = decay.to(b.dtype)
    decay = decay.contiguous() if fixed else rows(decay)
    initial, cu_seqlens = (None if t is None else t.contiguous() for t in (a.initial_state, a.cu_seqlens))
    if initial is not None:
        initial = initial.resolve_conj()
    fields = {
        "a": decay.data_ptr(),
        "b": b.data_ptr(),
        "initial": address(initial),
        "cu_seqlens": address(cu_seqlens),
        "dtype": int(wide == torch.float64) if b.is_complex() else native.DTYPES[b.dtype],
        "a_wide": decay.dtype != b.dtype,
        "is_complex": b.is_complex(),
        "log_a": a.log_a and not fixed,
        "fixed": fixed,
        "sequences": b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "length": b.shape[1],
        "d": b.shape[2],
        "threads": native.threads(4 * b.numel()),
        "a_batch": 0 if fixed else numbers * decay.stride(0),
        "a_time": 0 if fixed else numbers * decay.stride(1),
        "b_batch": numbers * b.stride(0),
        "b_time": numbers * b.stride(1),
    }
    return fields, [decay, b, initial, cu_seqlens]


def _exp(x: Tensor) -> Tensor:
    """torch.exp; of complex numbers with the same bits wherever they lie in memory, which torch.exp does not give."""
    if not x.is_complex():
        return torch.exp(x)
    size = torch.exp(x.real)
    return torch.complex(size * torch.cos(x.imag), size * torch.sin(x.imag))
