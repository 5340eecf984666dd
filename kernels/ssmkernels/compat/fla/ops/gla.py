"""``fla.ops.gla``."""

from ssmkernels.compat.fla import (
    chunk_gla,
    fused_chunk_gla,
    fused_recurrent_gla,
)

__all__ = [
    "chunk_gla",
    "fused_chunk_gla",
    "fused_recurrent_gla",
]
