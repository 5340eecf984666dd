"""``fla.ops.kda``."""

from ssmkernels.compat.fla import (
    chunk_kda,
    fused_recurrent_kda,
)

__all__ = [
    "chunk_kda",
    "fused_recurrent_kda",
]
