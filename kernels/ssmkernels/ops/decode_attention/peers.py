"""Other people's attention over a cache.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import FLASH_ATTN, TORCH, Peer, Setting, calls_like, refuse
from ssmkernels.ops.attention.peers import flash_options

SETTINGS = {"decode_attention": Setting(case={"lengths": "full"}, further=({"page_size": 16},), backward=False)}


@calls_like("decode_attention", takes="scale num_splits")
def sdpa(a: Any) -> Tensor:
    """PyTorch's scaled_dot_product_attention of one token over caches that are all full."""
    refuse(a.q.shape[1] != 1, "mask for several tokens")
    # On a GPU the lengths cannot be read without waiting for it; there they are taken to be full.
    full = a.lengths.device.type != "cpu" or bool((a.lengths == a.k_cache.shape[1]).all())
    refuse(not full, "cache that is not full")
    q, k, v = (t.transpose(1, 2) for t in (a.q, a.k_cache, a.v_cache))
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=a.scale, enable_gqa=shared).transpose(1, 2)


@calls_like("decode_attention", takes="block_table window scale softcap alibi_slopes num_splits")
def flash_attn(a: Any) -> Tensor:
    """FlashAttention 2 over a cache, split over keys."""
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        a.q,
        a.k_cache,
        a.v_cache,
        cache_seqlens=a.lengths,
        block_table=a.block_table,
        causal=True,
        num_splits=a.num_splits or 0,
        **flash_options(a),
    )


PEERS = {
    "decode_attention": (
        Peer("SDPA", TORCH, sdpa, "takes all caches to be full; heads before time, as a transposed view"),
        Peer("flash_attn", FLASH_ATTN, flash_attn, gradients=False),
    )
}
