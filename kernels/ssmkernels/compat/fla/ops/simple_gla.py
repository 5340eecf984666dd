"""``fla.ops.simple_gla``."""

from ssmkernels.compat.fla import (
    chunk_simple_gla,
    fused_recurrent_simple_gla,
)

__all__ = [
    "chunk_simple_gla",
    "fused_recurrent_simple_gla",
]
