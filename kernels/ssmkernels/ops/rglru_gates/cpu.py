"""The gates of the real-gated linear recurrent unit in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.memory import large_pages
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, plain, rows
from ssmkernels.native import wrong_device as unsupported

__all__ = ["backward", "forward", "missing", "unsupported"]

PARTS = 64  # of the sum over tokens, however many there are


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    fields, _kept = _fields(a)
    decay, inputs = a.declared.outputs(a)
    large_pages(decay, inputs)
    native.run("rglru_gates", fields | {"a": decay.data_ptr(), "b": inputs.data_ptr()})
    return decay, inputs


def backward(a: Any, _: Any, grads: Any) -> dict[str, Any]:
    fields, (x, *_kept) = _fields(a)
    wide = precision(x)
    da, db = plain(grads.a, wide), x.new_zeros(x.shape) if grads.b is None else plain(grads.b, x.dtype)
    dx, dgates = x.new_empty(x.shape), x.new_empty(a.gates.shape)
    dlog_decay = x.new_zeros((PARTS, *a.log_decay.shape), dtype=wide)
    large_pages(dx, dgates)
    fields |= {"a": 0, "b": 0, "da": da.data_ptr(), "db": db.data_ptr(), "parts": PARTS}
    fields |= {"dx": dx.data_ptr(), "dgates": dgates.data_ptr(), "dlog_decay": dlog_decay.data_ptr()}
    native.run("rglru_gates_backward", fields)
    return {"x": dx, "gates": dgates, "log_decay": dlog_decay.sum(0)}


def _fields(a: Any) -> tuple[dict[str, int], list[Any]]:
    """The kernel's arguments except the outputs, and the tensors that they point into."""
    x, gates, log_decay = rows(a.x), rows(a.gates), plain(a.log_decay, precision(a.x))
    first = None if a.first is None else a.first.contiguous()
    fields = {
        "x": x.data_ptr(),
        "gates": gates.data_ptr(),
        "log_decay": log_decay.data_ptr(),
        "first": address(first),
        "dtype": native.DTYPES[x.dtype],
        "threads": native.threads(32 * x.numel()),
    }
    fields |= dict(zip(("batch", "length", "heads", "p"), x.shape, strict=True))
    for name, t in (("x", x), ("gates", gates)):
        fields |= {f"{name}_{axis}": t.stride(i) for i, axis in enumerate(("batch", "time", "head"))}
    return fields, [x, gates, log_decay, first]
