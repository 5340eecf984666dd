"""The native selective scan's step (``cpu_step.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, rows
from ssmkernels.ops.selective_scan.cpu import unsupported
from ssmkernels.ops.selective_scan.cpu_arguments import kernel, maps, reals

__all__ = ["forward", "missing", "unsupported"]

_STEP = """
    state u delta z A B C D delta_bias y dtype batch d n groups_B groups_C softplus threads
    u_batch delta_batch z_batch B_batch C_batch
"""
_Step = native.arguments("_Step", _STEP)


def forward(a: Any, _: bool) -> Tensor:
    own = a.state.resolve_conj().contiguous()
    wide = own.real.dtype if own.is_complex() else own.dtype
    u, delta = rows(a.u), rows(a.delta)
    A = reals(a.A.to(own.dtype)).contiguous()
    B, C = (_map(t) for t in maps(a.B, a.C, own.dtype))
    z = None if a.z is None else rows(a.z)
    D = None if a.D is None else a.D.to(wide).contiguous()
    delta_bias = None if a.delta_bias is None else a.delta_bias.to(wide).contiguous()
    y = u.new_empty(u.shape)
    batch, d = u.shape
    n = A.shape[1]
    native.run(
        kernel(a.A, "_step"),
        _Step(
            own.data_ptr(),
            u.data_ptr(),
            delta.data_ptr(),
            address(z),
            A.data_ptr(),
            B.data_ptr(),
            C.data_ptr(),
            address(D),
            address(delta_bias),
            y.data_ptr(),
            native.DTYPES[u.dtype],
            batch,
            d,
            n,
            1 if B.ndim == 2 else B.shape[1],
            1 if C.ndim == 2 else C.shape[1],
            a.delta_softplus,
            native.threads(batch * d * n),
            u.stride(0),
            delta.stride(0),
            0 if z is None else z.stride(0),
            B.stride(0),
            C.stride(0),
        ),
    )
    if own is not a.state:
        a.state.copy_(own)
    return y


def _map(x: Tensor) -> Tensor:
    """B or C (b n) or (b g n) with its groups and states side by side."""
    beside = (x.stride(-1) == 1 or x.shape[-1] == 1) and (x.ndim == 2 or x.stride(1) == x.shape[2])
    return x if beside else x.contiguous()
