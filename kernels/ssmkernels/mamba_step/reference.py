"""One token of Mamba's inner block as its definition reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.causal_conv1d.reference import causal_conv1d_step
from ssmkernels.rms_norm.reference import rms_norm
from ssmkernels.selective_scan.reference import selective_scan_step
from ssmkernels.validate import precision


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
    return compose(
        causal_conv1d_step,
        selective_scan_step,
        conv_state,
        ssm_state,
        x,
        z,
        conv_weight,
        conv_bias,
        x_proj,
        dt_proj,
        dt_bias,
        A_log,
        D,
        norm_eps,
    )


def compose(
    conv_step: Callable[..., Tensor],
    scan_step: Callable[..., Tensor],
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
    x = conv_step(conv_state, x, conv_weight, conv_bias, "silu")  # (b d)
    r, n = dt_proj.shape[1], A_log.shape[1]
    dt, B, C = F.linear(x, x_proj).split([r, n, n], dim=-1)  # (b r), (b n), (b n)
    if norm_eps is not None:
        dt, B, C = (_normalised(t, norm_eps) for t in (dt, B, C))
    A = -torch.exp(A_log.to(precision(x)))
    return scan_step(ssm_state, x, F.linear(dt, dt_proj), A, B, C, D, z, dt_bias, True)


def _normalised(x: Tensor, eps: float) -> Tensor:
    return rms_norm(x, x.new_ones(x.shape[-1]), eps, None, True, None, None)[0]
