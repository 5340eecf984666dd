"""``fla.ops.retention``."""

from ssmkernels.compat.fla import (
    chunk_retention,
    fused_chunk_retention,
    fused_recurrent_retention,
)

__all__ = [
    "chunk_retention",
    "fused_chunk_retention",
    "fused_recurrent_retention",
]
