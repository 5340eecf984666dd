"""The selective scan's step in Triton: its launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.library import operator_or_plain
from ssmkernels.core.triton_support import kernels, on_device_of
from ssmkernels.ops.selective_scan.triton_arguments import forward_options, values


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
    y = u.new_empty(u.shape)
    groups = max(t.shape[1] if t.ndim == 3 else 1 for t in (B, C))
    per_group = A.shape[0] // groups
    options = forward_options(A.shape[1], per_group, u.dtype)
    blocks = -(-per_group // options["BLOCK_D"])
    programs = u.shape[0] * groups * blocks
    if programs:
        u1, delta1, B1, C1 = (t.unsqueeze(1) for t in (u, delta, B, C))  # a length of 1
        z1 = None if z is None else z.unsqueeze(1)
        fields = values(u1, delta1, A, B1, C1, D, z1, delta_bias, delta_softplus, None, groups)
        fields = {k: v for k, v in fields.items() if not k.endswith("_time") and k not in ("length", "cu_seqlens")}
        fields |= dict(zip(("state_batch", "state_d", "state_n"), state.stride(), strict=True))
        fields |= {"state": state, "y": y, "blocks": blocks, "d_blocks": groups * blocks}
        for name in ("FIXED_B", "FIXED_C"):
            del fields[name]
        options = {name: option for name, option in options.items() if name not in ("CHUNK", "T")}
        with on_device_of(u):
            kernels(__package__).step[(programs,)](**fields, **options)
    return y


step = torch.library.custom_op("ssmkernels::selective_scan_step_triton", _step, mutates_args=("state",))


@step.register_fake
def _(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return u.new_empty(u.shape)
