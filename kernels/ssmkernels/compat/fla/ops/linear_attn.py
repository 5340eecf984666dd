"""``fla.ops.linear_attn``."""

from ssmkernels.compat.fla import (
    chunk_linear_attn,
    fused_chunk_linear_attn,
    fused_recurrent_linear_attn,
)

__all__ = [
    "chunk_linear_attn",
    "fused_chunk_linear_attn",
    "fused_recurrent_linear_attn",
]
