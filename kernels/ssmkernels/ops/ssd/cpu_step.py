"""The native state-space dual's step (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, plain, rows
from ssmkernels.native.prepared import Prepared, update
from ssmkernels.ops.ssd.cpu import unsupported
from ssmkernels.ops.ssd.cpu_arguments import side_by_side

__all__ = ["forward", "missing", "prepared", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, ("state",))


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    own = a.state.contiguous()
    wide = own.dtype
    x, dt = side_by_side(a.x), rows(a.dt)
    z = None if a.z is None else side_by_side(a.z)
    B, C = (side_by_side(t if t.dtype == wide else t.to(wide)) for t in (a.B, a.C))
    A = plain(a.A, wide)
    D, dt_bias = (None if t is None else plain(t, wide) for t in (a.D, a.dt_bias))
    y = x.new_empty(x.shape)
    batch, heads, p, n = own.shape
    # Below twice the usual size a core is done before another that PyTorch's threads keep busy has begun.
    threads = native.threads(own.numel() // 2)
    return Prepared(
        "ssd_step",
        {
            "state": own.data_ptr(),
            "x": x.data_ptr(),
            "z": address(z),
            "dt": dt.data_ptr(),
            "A": A.data_ptr(),
            "B": B.data_ptr(),
            "C": C.data_ptr(),
            "D": address(D),
            "dt_bias": address(dt_bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "batch": batch,
            "heads": heads,
            "p": p,
            "n": n,
            "groups": B.shape[1],
            "skip": p if D is not None and D.ndim == 2 else 1,
            "softplus": a.dt_softplus,
            "threads": threads,
            "x_batch": x.stride(0),
            "z_batch": 0 if z is None else z.stride(0),
            "dt_batch": dt.stride(0),
            "B_batch": B.stride(0),
            "C_batch": C.stride(0),
            "dt_least": a.dt_limit[0],
            "dt_most": a.dt_limit[1],
        },
        (own, x, z, dt, A, B, C, D, dt_bias),
        y,
    )
