"""The causal convolution in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, rows
from ssmkernels.native import wrong_device as unsupported

__all__ = ["backward", "forward", "missing", "unsupported"]


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor]:
    fields, _kept = _fields(a)
    y = a.x.new_empty(a.x.shape)
    final_state = a.x.new_empty((fields["sequences"], fields["width"] - 1, fields["d"]), dtype=precision(a.x))
    large_pages(y)
    fields |= {"y": y.data_ptr(), "final_state": final_state.data_ptr()}
    native.run("causal_conv1d", fields)
    return y, final_state


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Any]:
    fields, _kept = _fields(a)
    dy, dfinal = rows(grads.y), None if grads.final_state is None else grads.final_state.contiguous()
    wide = precision(a.x)
    found = {
        "x": a.x.new_empty(a.x.shape),
        "weight": a.weight.new_empty(a.weight.shape, dtype=wide),
        "bias": None if a.bias is None else a.bias.new_empty(a.bias.shape, dtype=wide),
        "initial_state": None if a.initial_state is None else a.initial_state.new_empty(a.initial_state.shape),
    }
    large_pages(found["x"])
    fields |= {"d" + name.removesuffix("_state"): address(g) for name, g in found.items()}
    fields |= {
        "y": 0,
        "final_state": 0,
        "dy": dy.data_ptr(),
        "dfinal": address(dfinal),
        "dy_batch": dy.stride(0),
        "dy_time": dy.stride(1),
    }
    native.run("causal_conv1d_backward", fields)
    return found


def _fields(a: Any) -> tuple[dict[str, int], list[Any]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    wide = precision(a.x)
    x, weight = rows(a.x), a.weight.to(wide).contiguous()
    bias = None if a.bias is None else a.bias.to(wide).contiguous()
    initial_state, cu_seqlens = (None if t is None else t.contiguous() for t in (a.initial_state, a.cu_seqlens))
    fields = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "bias": address(bias),
        "initial": address(initial_state),
        "cu_seqlens": address(cu_seqlens),
        "dtype": native.DTYPES[x.dtype],
        "sequences": x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "length": x.shape[1],
        "d": x.shape[2],
        "width": weight.shape[1],
        "silu": a.activation == "silu",
        "threads": torch.get_num_threads(),
        "x_batch": x.stride(0),
        "x_time": x.stride(1),
    }
    return fields, [x, weight, bias, initial_state, cu_seqlens]
