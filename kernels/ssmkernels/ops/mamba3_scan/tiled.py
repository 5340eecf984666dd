"""Mamba-3's recurrence in chunks of matrix products, in PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.ops.mamba3_scan.chunks import in_chunks
from ssmkernels.ops.ssd.tiled import dual


def compute(a: Any) -> tuple[Tensor, ...]:
    return in_chunks(a, dual)
