"""flash-linear-attention's functions: its names and its layout, time before heads, on a CPU as well as on a GPU.

Written after flash-linear-attention 0.6.0. Imports change like this::

    fla.ops                                          → ssmkernels.compat.fla.ops
    fla.ops.delta_rule, fla.ops.gla, fla.ops.kda, …  → ssmkernels.compat.fla.ops.delta_rule, …
    fla.modules, fla.modules.convolution, …          → ssmkernels.compat.fla.modules, …

All functions of an op, in chunks or recurrent, compute the same here. Any dtype, any strides and lengths are taken.
Groups of heads of values may share queries and keys in all of them.

Sizes: b batch, l length, g heads of queries and keys, h heads of values (a multiple), k and v channels of a head, s
sequences (b, or as many as ``cu_seqlens`` packs). Every function returns the output ``(b, l, h, v)`` in v's dtype, and
the state after the last token, float32 (float64 for float64 input), or None without ``output_final_state``. The states
are ``(s, h, k, v)``, or ``(s, h, v, k)`` with ``state_v_first``. ``chunk_size`` has no effect; ``reverse`` and
unknown keywords are refused.
"""

from __future__ import annotations

from ssmkernels.compat.fla._delta import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
)
from ssmkernels.compat.fla._linear import (
    chunk_gla,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_simple_gla,
)

__version__ = "0.6.0"

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_kda",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
]

fused_chunk_delta_rule, fused_recurrent_delta_rule = chunk_delta_rule, chunk_delta_rule
fused_chunk_gla = chunk_gla
fused_chunk_retention = fused_recurrent_retention = chunk_retention
fused_chunk_linear_attn = fused_recurrent_linear_attn = chunk_linear_attn
