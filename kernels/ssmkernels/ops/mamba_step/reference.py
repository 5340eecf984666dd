"""One token of a Mamba layer as its definition reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.finite import finite_exp
from ssmkernels.core.names import OPS
from ssmkernels.core.validate import precision
from ssmkernels.ops.causal_conv1d import reference as conv
from ssmkernels.ops.rms_norm import reference as norm
from ssmkernels.ops.selective_scan import reference as scan


def compute(a: Any) -> Tensor:
    Conv, Scan = (OPS[name].declared.Arguments for name in ("causal_conv1d_step", "selective_scan_step"))
    return compose(a, F.linear, lambda *x: conv.step(Conv(*x)), lambda *x: scan.compute.step(Scan(*x)))


def compose(
    a: Any, linear: Callable[..., Tensor], conv_step: Callable[..., Tensor], scan_step: Callable[..., Tensor]
) -> Tensor:
    """The layer's token by these functions."""
    x, z = linear(a.x, a.in_proj, a.in_bias).chunk(2, dim=-1)  # (b d) each
    x = conv_step(a.conv_state, x, a.conv_weight, a.conv_bias, "silu")
    r, n = a.dt_proj.shape[1], a.A_log.shape[1]
    dt, B, C = F.linear(x, a.x_proj).split([r, n, n], dim=-1)  # (b r), (b n), (b n)
    if a.norm_eps is not None:
        dt, B, C = (_normalised(t, a.norm_eps) for t in (dt, B, C))
    A = -finite_exp(a.A_log.to(precision(x)))
    y = scan_step(a.ssm_state, x, F.linear(dt, a.dt_proj), A, B, C, a.D, z, a.dt_bias, True)
    return linear(y, a.out_proj, a.out_bias)


def _normalised(x: Tensor, eps: float) -> Tensor:
    arguments = OPS["rms_norm"].declared.Arguments
    return norm.compute(arguments(x, x.new_ones(x.shape[-1]), eps, None, True, None, None))[0]
