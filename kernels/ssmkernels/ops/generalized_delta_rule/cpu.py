"""The general delta rule in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, plain, wrong_device
from ssmkernels.native.kept import kept_row
from ssmkernels.ops.generalized_delta_rule.cpu_arguments import ACTIVATIONS, segments, tokens, values

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]

SAVES = ("starts",)  # the states before every segment, (segments h k v): rows as ``kept_row`` says


def unsupported(a: Any) -> str | None:
    return wrong_device(a) or ("no heads or channels" if 0 in (*a.q.shape[-2:], a.v.shape[-1]) else None)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state, starts = empty(a, save)
    large_pages(o, starts)
    fields, _kept = values(a, starts if save else None)
    native.run("generalized_delta_rule", fields | {"o": o.data_ptr(), "final_state": final_state.data_ptr()})
    return o, final_state, starts


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    wide = precision(a.q)
    fields, _kept = values(a, saved.starts)
    found: dict[str, Tensor | None] = {name: a.q.new_empty(getattr(a, name).shape) for name in ACTIVATIONS}
    found["log_decay"] = a.q.new_empty(a.q.shape, dtype=wide)
    found["initial_state"] = None if a.initial_state is None else a.q.new_empty(a.initial_state.shape, dtype=wide)
    large_pages(*found.values())
    d_o = grads.o.contiguous()
    d_final = None if grads.final_state is None else plain(grads.final_state, wide)
    outputs = {f"d{name}": address(found[name]) for name in ACTIVATIONS}
    outputs |= {"d_log_decay": address(found["log_decay"]), "d_initial": address(found["initial_state"])}
    outputs |= {"o": 0, "final_state": 0, "d_o": d_o.data_ptr(), "d_final": address(d_final)}
    native.run("generalized_delta_rule_backward", fields | outputs)
    return found


def empty(a: Any, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state = a.declared.outputs(a)
    row, dtype = kept_row(a.v.shape[3], a.q)
    # Packed, some segments belong to no sequence
    new = a.q.new_zeros if save and a.cu_seqlens is not None else a.q.new_empty
    return o, final_state, new((segments(a, tokens(a)) if save else 0, *final_state.shape[1:3], row), dtype=dtype)
