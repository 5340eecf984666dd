"""One token of a Mamba layer by the convolution's step and the scan's, whichever implementations they take."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.products import linear
from ssmkernels.ops.causal_conv1d import causal_conv1d_step
from ssmkernels.ops.mamba_step.reference import compose
from ssmkernels.ops.selective_scan import selective_scan_step


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
        linear,
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
