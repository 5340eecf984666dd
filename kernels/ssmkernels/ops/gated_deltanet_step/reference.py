"""One token of a gated DeltaNet layer as its definition reads."""

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
from ssmkernels.ops.delta_rule import reference as delta
from ssmkernels.ops.rms_norm import reference as norm

L2_EPS = 1e-6  # added to the sum of squares of a query or key


def compute(a: Any) -> Tensor:
    Conv, Delta, Norm = (OPS[name].declared.Arguments for name in ("causal_conv1d_step", "delta_rule_step", "rms_norm"))
    return compose(
        a,
        F.linear,
        lambda *x: conv.step(Conv(*x)),
        lambda *x: delta.compute.step(Delta(*x, None)),
        lambda x, weight, eps, gate: norm.compute(Norm(x, weight, eps, gate, True, None, None))[0],
    )


def compose(
    a: Any,
    linear: Callable[..., Tensor],
    conv_step: Callable[..., Tensor],
    delta_step: Callable[..., Tensor],
    norm: Callable[..., Tensor],
) -> Tensor:
    """The layer's token by these functions."""
    _, _, k_dim, v_dim = a.state.shape
    q, k, v = (
        conv_step(state, linear(a.x, proj), weight, None, "silu")
        for state, proj, weight in (
            (a.q_state, a.q_proj, a.q_conv),
            (a.k_state, a.k_proj, a.k_conv),
            (a.v_state, a.v_proj, a.v_conv),
        )
    )
    q, k = (_normalised(t.unflatten(-1, (-1, k_dim))) for t in (q, k))
    wide = precision(a.x)
    beta = a.beta_scale * torch.sigmoid(linear(a.x, a.b_proj).to(wide))
    log_decay = -finite_exp(a.A_log.to(wide)) * F.softplus(
        linear(a.x, a.a_proj).to(wide) + a.dt_bias.to(wide), threshold=40
    )
    o = delta_step(a.state, q, k, v.unflatten(-1, (-1, v_dim)), beta, log_decay)
    gate = linear(a.x, a.g_proj).view_as(o)
    return linear(norm(o, a.norm_weight.to(o.dtype), a.norm_eps, gate).flatten(1), a.o_proj)


def _normalised(x: Tensor) -> Tensor:
    wide = x.to(precision(x))
    return (wide / torch.sqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)
