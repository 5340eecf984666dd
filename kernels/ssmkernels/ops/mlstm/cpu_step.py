"""The native step of the matrix memory (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import missing, plain, wrong_device
from ssmkernels.native.prepared import Prepared, update
from ssmkernels.ops.mlstm.reference import scale_of

__all__ = ["forward", "missing", "prepared", "unsupported"]

STATES = ("C", "n", "m")


def unsupported(a: Any) -> str | None:
    return wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, STATES)


def prepared(a: Any) -> Prepared:
    """The kernel's call; states that are not contiguous are copied."""
    (y,) = a.declared.outputs(a)
    tensors = {name: getattr(a, name).contiguous() for name in (*STATES, "q", "k", "v")}
    tensors |= {name: plain(getattr(a, name), a.C.dtype) for name in ("i", "f")} | {"y": y}
    batch, heads, keys, values = a.C.shape
    fields: dict[str, float] = {name: t.data_ptr() for name, t in tensors.items()}
    fields |= {
        "dtype": native.DTYPES[a.q.dtype],
        "heads": batch * heads,
        "keys": keys,
        "values": values,
        "threads": native.threads(a.C.numel()),
        "scale": scale_of(a.scale, a.q),
    }
    return Prepared("mlstm_step", fields, tuple(tensors.values()), y)
