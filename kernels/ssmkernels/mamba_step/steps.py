"""One token of Mamba's inner block by the convolution's step and the scan's, whichever implementations they take."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.causal_conv1d import causal_conv1d_step
from ssmkernels.mamba_step.reference import compose
from ssmkernels.selective_scan import selective_scan_step


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
