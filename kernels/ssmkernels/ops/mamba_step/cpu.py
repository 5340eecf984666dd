"""One token of a Mamba layer in the native CPU library (``cpu.cpp``): one call, each weight read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import gradient_wanted
from ssmkernels.native import address, missing, plain, rows

__all__ = ["mamba_step", "missing", "step_unsupported"]

TILE = 64  # channels: kTile in tiles.h
FEW = 8  # sequences; from there on a matrix product of a library does better by the weights than row by row


def step_unsupported(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    if x.device.type != "cpu":
        return f"its tensors must be on the CPU; `x` is on {x.device}"
    if 0 in arguments["A_log"].shape or arguments["dt_proj"].shape[1] == 0:
        return "no channels, no states or no rank"
    if x.shape[0] > FEW and not torch.compiler.is_exporting():  # a program for any number has one way
        return f"more than {FEW} sequences, for which matrix products are faster"
    return gradient_wanted(arguments)


def mamba_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    norm_eps: float | None,
) -> Tensor:
    run = step if torch.compiler.is_compiling() else _step
    weights = (in_proj, in_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias)
    return run(conv_state, ssm_state, x, *weights, norm_eps)


def _step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    norm_eps: float | None,
) -> Tensor:
    states = (conv_state, ssm_state)
    own = [state.contiguous() for state in states]
    wide = ssm_state.dtype
    x = rows(x)
    in_proj, x_proj, dt_proj, out_proj = [t.contiguous() for t in (in_proj, x_proj, dt_proj, out_proj)]
    conv_weight, dt_bias, A_log, D = [plain(t, wide) for t in (conv_weight, dt_bias, A_log, D)]
    in_bias, conv_bias, out_bias = [None if t is None else plain(t, wide) for t in (in_bias, conv_bias, out_bias)]
    (batch, d, n), (width, rank) = ssm_state.shape, (conv_weight.shape[1], dt_proj.shape[1])
    m = x.shape[1]
    y = x.new_empty(batch, m)
    threads = native.threads(in_proj.numel() + out_proj.numel())
    between = batch * (m + 4 * d + rank + 2 * n)
    scratch = ssm_state.new_empty(between + threads * (width + 1) * TILE)
    native.run(
        "mamba_step",
        {
            "conv_state": own[0].data_ptr(),
            "ssm_state": own[1].data_ptr(),
            "x": x.data_ptr(),
            "in_proj": in_proj.data_ptr(),
            "in_bias": address(in_bias),
            "conv_weight": conv_weight.data_ptr(),
            "conv_bias": address(conv_bias),
            "x_proj": x_proj.data_ptr(),
            "dt_proj": dt_proj.data_ptr(),
            "dt_bias": dt_bias.data_ptr(),
            "A_log": A_log.data_ptr(),
            "D": D.data_ptr(),
            "out_proj": out_proj.data_ptr(),
            "out_bias": address(out_bias),
            "y": y.data_ptr(),
            "scratch": scratch.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "batch": batch,
            "m": m,
            "d": d,
            "n": n,
            "width": width,
            "rank": rank,
            "normalised": norm_eps is not None,
            "threads": threads,
            "x_batch": x.stride(0),
            "eps": norm_eps or 0.0,
        },
    )
    for state, used in zip(states, own, strict=True):
        if used is not state:
            state.copy_(used)
    return y


step = torch.library.custom_op("ssmkernels::mamba_step_cpu", _step, mutates_args=("conv_state", "ssm_state"))


@step.register_fake
def _(conv_state, ssm_state, x, *_):
    return x.new_empty(x.shape)
