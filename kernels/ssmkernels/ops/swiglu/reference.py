"""The gated product as its definition reads."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import precision


def compute(a: Any) -> Tensor:
    """y."""
    wide = precision(a.gate)
    return (F.silu(a.gate.to(wide) * a.scale) * a.up.to(wide)).to(a.gate.dtype).contiguous()
