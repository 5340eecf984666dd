"""The native step of Mamba-3's recurrence (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, plain, rows, wrong_device
from ssmkernels.native.prepared import Prepared, update
from ssmkernels.ops.ssd.cpu_arguments import side_by_side

__all__ = ["forward", "missing", "prepared", "unsupported"]

STATES = ("state", "angle", "key", "value")


def unsupported(a: Any) -> str | None:
    sizes = (*a.x.shape[-3:], a.B.shape[-1])
    return "no inputs, heads, channels or states" if 0 in sizes else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, STATES)


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    own = {name: getattr(a, name).contiguous() for name in STATES}
    wide = own["state"].dtype
    x, B, C = side_by_side(a.x), rows(a.B), rows(a.C)
    z = None if a.z is None else side_by_side(a.z)
    y = a.x.new_empty(a.x.shape)
    names = ("dt", "A", "trap", "angles", "B_bias", "C_bias", "D")
    given = {name: getattr(a, name) for name in names}
    tensors = {name: None if t is None else plain(t, wide) for name, t in given.items()}
    tensors |= own | {"x": x, "z": z, "B": B, "C": C, "y": y}
    batch, rank, heads, p = x.shape
    fields: dict[str, float] = {name: address(t) for name, t in tensors.items()}
    fields |= {
        "dtype": native.DTYPES[x.dtype],
        "batch": batch,
        "heads": heads,
        "rank": rank,
        "p": p,
        "n": B.shape[3],
        "groups": B.shape[2],
        "angle_count": a.angles.shape[1],
        "interleaved": a.interleaved,
        "threads": native.threads(own["state"].numel()),
        "x_batch": x.stride(0),
        "x_rank": x.stride(1),
        "z_batch": 0 if z is None else z.stride(0),
        "z_rank": 0 if z is None else z.stride(1),
        "B_batch": B.stride(0),
        "B_rank": B.stride(1),
        "B_group": B.stride(2),
        "C_batch": C.stride(0),
        "C_rank": C.stride(1),
        "C_group": C.stride(2),
    }
    return Prepared("mamba3_scan_step", fields, tuple(tensors.values()), y)
