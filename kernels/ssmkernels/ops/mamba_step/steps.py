"""One token of a Mamba layer by the convolution's step and the scan's, whichever implementations they take."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.native.products import linear
from ssmkernels.ops.causal_conv1d import causal_conv1d_step
from ssmkernels.ops.mamba_step.reference import compose
from ssmkernels.ops.selective_scan import selective_scan_step


def compute(a: Any) -> Tensor:
    return compose(a, linear, causal_conv1d_step, selective_scan_step)
