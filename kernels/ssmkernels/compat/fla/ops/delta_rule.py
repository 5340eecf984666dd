"""``fla.ops.delta_rule``."""

from ssmkernels.compat.fla import (
    chunk_delta_rule,
    fused_chunk_delta_rule,
    fused_recurrent_delta_rule,
)

__all__ = [
    "chunk_delta_rule",
    "fused_chunk_delta_rule",
    "fused_recurrent_delta_rule",
]
