"""The native selective scan's step (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, plain, rows
from ssmkernels.native.prepared import Prepared
from ssmkernels.ops.selective_scan.cpu import unsupported
from ssmkernels.ops.selective_scan.cpu_arguments import kernel, maps, reals

__all__ = ["forward", "missing", "prepared", "unsupported"]

UPDATE = 4  # multiply-adds in the time that one number of a state takes, with its exponential


def forward(a: Any, _: bool) -> Tensor:
    own = a.state.resolve_conj().contiguous()
    y = prepared(a._replace(state=own)).run()
    if own is not a.state:
        a.state.copy_(own)
    return y


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    own = a.state.resolve_conj().contiguous()
    wide = own.real.dtype if own.is_complex() else own.dtype
    u, delta = rows(a.u), rows(a.delta)
    A = reals(a.A.to(own.dtype)).contiguous()
    B, C = (_map(t) for t in maps(a.B, a.C, own.dtype))
    z = None if a.z is None else rows(a.z)
    D, delta_bias = (None if t is None else plain(t, wide) for t in (a.D, a.delta_bias))
    y = u.new_empty(u.shape)
    batch, d = u.shape
    n = A.shape[1]
    return Prepared(
        kernel(a.A, "_step"),
        {
            "state": own.data_ptr(),
            "u": u.data_ptr(),
            "delta": delta.data_ptr(),
            "z": address(z),
            "A": A.data_ptr(),
            "B": B.data_ptr(),
            "C": C.data_ptr(),
            "D": address(D),
            "delta_bias": address(delta_bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[u.dtype],
            "batch": batch,
            "d": d,
            "n": n,
            "groups_B": 1 if B.ndim == 2 else B.shape[1],
            "groups_C": 1 if C.ndim == 2 else C.shape[1],
            "softplus": a.delta_softplus,
            "threads": native.threads(UPDATE * batch * d * n),
            "u_batch": u.stride(0),
            "delta_batch": delta.stride(0),
            "z_batch": 0 if z is None else z.stride(0),
            "B_batch": B.stride(0),
            "C_batch": C.stride(0),
        },
        (own, u, delta, z, A, B, C, D, delta_bias),
        y,
    )


def _map(x: Tensor) -> Tensor:
    """B or C (b n) or (b g n) with its groups and states side by side."""
    beside = (x.stride(-1) == 1 or x.shape[-1] == 1) and (x.ndim == 2 or x.stride(1) == x.shape[2])
    return x if beside else x.contiguous()
