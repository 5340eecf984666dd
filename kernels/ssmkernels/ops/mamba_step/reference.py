"""One token of a Mamba layer as its definition reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.causal_conv1d.reference import causal_conv1d_step
from ssmkernels.ops.rms_norm.reference import rms_norm
from ssmkernels.ops.selective_scan.reference import selective_scan_step


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
    return compose(
        F.linear,
        causal_conv1d_step,
        selective_scan_step,
        conv_state,
        ssm_state,
        x,
        in_proj,
        in_bias,
        conv_weight,
        conv_bias,
        x_proj,
        dt_proj,
        dt_bias,
        A_log,
        D,
        out_proj,
        out_bias,
        norm_eps,
    )


def compose(
    linear: Callable[..., Tensor],
    conv_step: Callable[..., Tensor],
    scan_step: Callable[..., Tensor],
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
    x, z = linear(x, in_proj, in_bias).chunk(2, dim=-1)  # (b d) each
    x = conv_step(conv_state, x, conv_weight, conv_bias, "silu")
    r, n = dt_proj.shape[1], A_log.shape[1]
    dt, B, C = F.linear(x, x_proj).split([r, n, n], dim=-1)  # (b r), (b n), (b n)
    if norm_eps is not None:
        dt, B, C = (_normalised(t, norm_eps) for t in (dt, B, C))
    A = -torch.exp(A_log.to(precision(x)))
    y = scan_step(ssm_state, x, F.linear(dt, dt_proj), A, B, C, D, z, dt_bias, True)
    return linear(y, out_proj, out_bias)


def _normalised(x: Tensor, eps: float) -> Tensor:
    return rms_norm(x, x.new_ones(x.shape[-1]), eps, None, True, None, None)[0]
