"""``fla.ops.simple_gla``."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla import Found, linear
from ssmkernels.compat.fla import (
    chunk_simple_gla,
    fused_recurrent_simple_gla,
)

__all__ = [
    "chunk_simple_gla",
    "fused_chunk_simple_gla",
    "fused_recurrent_simple_gla",
    "parallel_simple_gla",
]

fused_chunk_simple_gla = chunk_simple_gla


@compatible(linear, initial_state=None, output_final_state=False)
def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Found:
    """As :func:`chunk_simple_gla`, with None in the place of a state; ``output_attentions`` is refused."""
