"""One token of a Mamba-2 layer by the steps of its parts, whichever implementations they take."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from ssmkernels.native.products import linear
from ssmkernels.ops.causal_conv1d import causal_conv1d_step
from ssmkernels.ops.mamba2_step.reference import compose
from ssmkernels.ops.rms_norm import rms_norm
from ssmkernels.ops.ssd import ssd_step


def compute(a: Any) -> Tensor:
    return compose(
        a,
        linear,
        causal_conv1d_step,
        lambda *x: ssd_step(*x[:-1], dt_limit=x[-1]),
        _norm,
    )


def _norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor, first: bool, size: int) -> Tensor:
    return cast(Tensor, rms_norm(x, weight, eps=eps, gate=gate, norm_before_gate=first, group_size=size))
