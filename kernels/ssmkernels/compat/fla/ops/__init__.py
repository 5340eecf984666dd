"""All functions, as ``fla.ops`` has them."""

from ssmkernels.compat import fla
from ssmkernels.compat.fla import *  # noqa: F403
from ssmkernels.compat.fla.ops.attn import parallel_attn
from ssmkernels.compat.fla.ops.forgetting_attn import parallel_forgetting_attn
from ssmkernels.compat.fla.ops.gated_delta_rule import chunk_gdn, fused_recurrent_gdn
from ssmkernels.compat.fla.ops.generalized_delta_rule import (
    chunk_dplr_delta_rule,
    chunk_iplr_delta_rule,
    fused_recurrent_dplr_delta_rule,
    fused_recurrent_iplr_delta_rule,
)
from ssmkernels.compat.fla.ops.hgrn import fused_recurrent_hgrn
from ssmkernels.compat.fla.ops.lightning_attn import chunk_lightning_attn, fused_recurrent_lightning_attn
from ssmkernels.compat.fla.ops.retention import parallel_retention
from ssmkernels.compat.fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
from ssmkernels.compat.fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7
from ssmkernels.compat.fla.ops.simple_gla import fused_chunk_simple_gla, parallel_simple_gla

__all__ = [
    *fla.__all__,
    "chunk_dplr_delta_rule",
    "chunk_gdn",
    "chunk_iplr_delta_rule",
    "chunk_lightning_attn",
    "chunk_rwkv6",
    "chunk_rwkv7",
    "fused_chunk_simple_gla",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_hgrn",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_rwkv6",
    "fused_recurrent_rwkv7",
    "parallel_attn",
    "parallel_forgetting_attn",
    "parallel_retention",
    "parallel_simple_gla",
]
