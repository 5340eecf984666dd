"""The native step of the matrix memory (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import missing, plain, wrong_device
from ssmkernels.ops.mlstm.reference import scale_of

__all__ = ["forward", "missing", "unsupported"]

STATES = ("C", "n", "m")


def unsupported(a: Any) -> str | None:
    return wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    (y,) = a.declared.outputs(a)
    own = {name: getattr(a, name).contiguous() for name in STATES}
    tensors = {name: getattr(a, name).contiguous() for name in ("q", "k", "v")}
    tensors |= {name: plain(getattr(a, name), a.C.dtype) for name in ("i", "f")} | own | {"y": y}
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
    native.run("mlstm_step", fields)
    for name, state in own.items():
        if state is not getattr(a, name):
            getattr(a, name).copy_(state)
    return y
