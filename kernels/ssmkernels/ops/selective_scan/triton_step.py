"""The selective scan's step in Triton: its launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import kernels, missing, on_device_of, wrong_device
from ssmkernels.ops.selective_scan.triton_arguments import forward_options, settled, values

__all__ = ["forward", "missing", "unsupported"]

LARGEST = 256


def unsupported(a: Any) -> str | None:
    if a.A.is_complex():
        return "complex A"
    if a.A.numel() == 0:
        return "no channels or no states"
    if a.A.shape[1] > LARGEST:
        return f"a state of more than {LARGEST}"
    return wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    y = a.u.new_empty(a.u.shape)
    groups = max(t.shape[1] if t.ndim == 3 else 1 for t in (a.B, a.C))
    per_group = a.A.shape[0] // groups
    options = forward_options(a.A.shape[1], per_group, a.u.dtype)
    blocks = -(-per_group // options["BLOCK_D"])
    programs = a.u.shape[0] * groups * blocks
    if programs:
        scan = OPS["selective_scan"].declared.Arguments
        u, delta, B, C = (x.unsqueeze(1) for x in (a.u, a.delta, a.B, a.C))  # a length of 1
        z = None if a.z is None else a.z.unsqueeze(1)
        fields = values(scan(u, delta, a.A, B, C, a.D, z, a.delta_bias, a.delta_softplus, None, None), groups)
        fields = {k: v for k, v in fields.items() if k not in ("length", "cu_seqlens")}
        fields |= {"state": a.state, "state_strides": a.state.stride(), "y": y}
        fields |= {"blocks": blocks, "d_blocks": groups * blocks}
        with on_device_of(a.u):
            kernels(__package__).step[(programs,)](**settled(fields | options))
    return y
