"""One token of a Mamba-2 layer as its definition reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.finite import finite_exp
from ssmkernels.core.names import OPS
from ssmkernels.core.validate import precision
from ssmkernels.ops.causal_conv1d import reference as conv
from ssmkernels.ops.rms_norm import reference as norm
from ssmkernels.ops.ssd import reference as ssd


def compute(a: Any) -> Tensor:
    Conv, Ssd, Norm = (OPS[name].declared.Arguments for name in ("causal_conv1d_step", "ssd_step", "rms_norm"))
    return compose(
        a,
        F.linear,
        lambda *x: conv.step(Conv(*x)),
        lambda *x: ssd.compute.step(Ssd(*x)),
        lambda x, weight, eps, gate, first, size: norm.compute(Norm(x, weight, eps, gate, first, size, None))[0],
    )


def groups(a: Any) -> int:
    """How many groups of heads share B and C."""
    _, heads, p, n = a.ssm_state.shape
    return int((a.conv_weight.shape[0] - heads * p) // (2 * n))


def compose(
    a: Any,
    linear: Callable[..., Tensor],
    conv_step: Callable[..., Tensor],
    ssd_step: Callable[..., Tensor],
    norm: Callable[..., Tensor],
) -> Tensor:
    """The layer's token by these functions."""
    (_, h, p, n), c = a.ssm_state.shape, a.conv_weight.shape[0]
    d, g = h * p, groups(a)
    mlp = a.out_proj.shape[1] - d
    mlp_gate, value, z, xBC, dt = linear(a.x, a.in_proj, a.in_bias).split([mlp, mlp, d, c, h], dim=-1)
    xBC = conv_step(a.conv_state, xBC, a.conv_weight, a.conv_bias, "silu")
    x, B, C = xBC.split([d, g * n, g * n], dim=-1)
    A = -finite_exp(a.A_log.to(precision(x)))
    x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    y = ssd_step(a.ssm_state, x, dt, A, B, C, a.D, None, a.dt_bias, True, a.dt_limit).flatten(1)
    if a.norm_weight is None:
        y = y * F.silu(z)
    else:
        y = norm(y, a.norm_weight.to(y.dtype), a.norm_eps, z, a.norm_before_gate, d // a.norm_groups)
    if mlp:
        y = torch.cat([F.silu(mlp_gate) * value, y], dim=-1)
    return linear(y, a.out_proj, a.out_bias)
