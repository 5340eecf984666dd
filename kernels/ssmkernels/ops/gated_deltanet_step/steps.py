"""One token of a gated DeltaNet layer by the steps of its parts, whichever implementations they take."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from ssmkernels.native.products import linear
from ssmkernels.ops.causal_conv1d import causal_conv1d_step
from ssmkernels.ops.delta_rule import delta_rule_step
from ssmkernels.ops.gated_deltanet_step.reference import compose
from ssmkernels.ops.rms_norm import rms_norm


def compute(a: Any) -> Tensor:
    return compose(a, linear, causal_conv1d_step, delta_rule_step, _norm)


def _norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor) -> Tensor:
    return cast(Tensor, rms_norm(x, weight, eps=eps, gate=gate, norm_before_gate=True))
