"""One token of Mamba's inner block in the native CPU library (``cpu.cpp``): one call, each weight read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, rows
from ssmkernels.validate import gradient_wanted

__all__ = ["mamba_step", "missing", "step_unsupported"]

WAKINGS = 4  # of the other threads in one call, for what lies between must be done in order

_Step = native.arguments(
    "_Step",
    """
    conv_state ssm_state x z conv_weight conv_bias x_proj dt_proj dt_bias A_log D y inputs maps
    dtype batch d n width rank normalised threads x_batch z_batch eps
    """,
    numbers=("eps",),
)


def step_unsupported(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    if x.device.type != "cpu":
        return f"its tensors must be on the CPU; `x` is on {x.device}"
    if 0 in arguments["A_log"].shape or arguments["dt_proj"].shape[1] == 0:
        return "no channels, no states or no rank"
    return gradient_wanted(arguments)


def mamba_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_eps: float | None,
) -> Tensor:
    run = step if torch.compiler.is_compiling() else _step
    return run(conv_state, ssm_state, x, z, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, norm_eps)


def _step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_eps: float | None,
) -> Tensor:
    states = (conv_state, ssm_state)
    own = [state.contiguous() for state in states]
    wide = ssm_state.dtype
    x, z = rows(x), rows(z)
    x_proj, dt_proj = x_proj.contiguous(), dt_proj.contiguous()
    conv_weight, dt_bias, A_log, D = (t.to(wide).contiguous() for t in (conv_weight, dt_bias, A_log, D))
    conv_bias = None if conv_bias is None else conv_bias.to(wide).contiguous()
    y = x.new_empty(x.shape)
    batch, d, n = ssm_state.shape
    inputs = ssm_state.new_empty(batch, d)
    maps = ssm_state.new_empty(batch, x_proj.shape[0])
    native.run(
        "mamba_step",
        _Step(
            own[0].data_ptr(),
            own[1].data_ptr(),
            x.data_ptr(),
            z.data_ptr(),
            conv_weight.data_ptr(),
            address(conv_bias),
            x_proj.data_ptr(),
            dt_proj.data_ptr(),
            dt_bias.data_ptr(),
            A_log.data_ptr(),
            D.data_ptr(),
            y.data_ptr(),
            inputs.data_ptr(),
            maps.data_ptr(),
            native.DTYPES[x.dtype],
            batch,
            d,
            n,
            conv_weight.shape[1],
            dt_proj.shape[1],
            norm_eps is not None,
            native.threads(batch * d * (3 * n + 2 * dt_proj.shape[1]) // WAKINGS),
            x.stride(0),
            z.stride(0),
            norm_eps or 0.0,
        ),
    )
    for state, used in zip(states, own, strict=True):
        if used is not state:
            state.copy_(used)
    return y


step = torch.library.custom_op("ssmkernels::mamba_step_cpu", _step, mutates_args=("conv_state", "ssm_state"))


@step.register_fake
def _(conv_state, ssm_state, x, z, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, norm_eps):
    return x.new_empty(x.shape)
