"""The native selective scan's step (``cpu_step.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.library import operator_or_plain
from ssmkernels.native import address, rows
from ssmkernels.ops.selective_scan.cpu_arguments import kernel, maps, reals


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    return operator_or_plain(step, _step)(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    own = state.resolve_conj().contiguous()
    wide = own.real.dtype if own.is_complex() else own.dtype
    u, delta = rows(u), rows(delta)
    A_ = reals(A.to(own.dtype)).contiguous()
    B, C = (_map(t) for t in maps(B, C, own.dtype))
    z = None if z is None else rows(z)
    D = None if D is None else D.to(wide).contiguous()
    delta_bias = None if delta_bias is None else delta_bias.to(wide).contiguous()
    y = u.new_empty(u.shape)
    batch, d = u.shape
    n = A_.shape[1]
    native.run(
        kernel(A, "_step"),
        {
            "state": own.data_ptr(),
            "u": u.data_ptr(),
            "delta": delta.data_ptr(),
            "z": address(z),
            "A": A_.data_ptr(),
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
            "softplus": delta_softplus,
            "threads": native.threads(batch * d * n),
            "u_batch": u.stride(0),
            "delta_batch": delta.stride(0),
            "z_batch": 0 if z is None else z.stride(0),
            "B_batch": B.stride(0),
            "C_batch": C.stride(0),
        },
    )
    if own is not state:
        state.copy_(own)
    return y


def _map(x: Tensor) -> Tensor:
    """B or C (b n) or (b g n) with its groups and states side by side."""
    beside = (x.stride(-1) == 1 or x.shape[-1] == 1) and (x.ndim == 2 or x.stride(1) == x.shape[2])
    return x if beside else x.contiguous()


step = torch.library.custom_op("ssmkernels::selective_scan_step_cpu", _step, mutates_args=("state",))


@step.register_fake
def _(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return u.new_empty(u.shape)
