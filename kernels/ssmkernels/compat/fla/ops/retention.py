"""``fla.ops.retention``."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import Found, linear
from ssmkernels.compat.fla import (
    chunk_retention,
    fused_chunk_retention,
    fused_recurrent_retention,
)

__all__ = [
    "chunk_retention",
    "fused_chunk_retention",
    "fused_recurrent_retention",
    "parallel_retention",
]


@compatible(linear, initial_state=None, output_final_state=False)
def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Found:
    """As :func:`chunk_retention`, with None in the place of a state; ``output_attentions`` is refused."""
