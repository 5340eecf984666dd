"""Other people's attention over a cache.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import FLASH_ATTN, TORCH, Peer, Setting, refuse
from ssmkernels.ops.attention.peers import refuse_given

SETTINGS = {"decode_attention": Setting(case={"lengths": "full"}, further=({"page_size": 16},), backward=False)}


def sdpa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    num_splits: int | None = None,
    **others: Any,
) -> Tensor:
    """PyTorch's scaled_dot_product_attention of one token over caches that are all full."""
    refuse(q.shape[1] != 1, "mask for several tokens")
    refuse_given(others)
    # On a GPU the lengths cannot be read without waiting for it; there they are taken to be full.
    refuse(lengths.device.type == "cpu" and bool((lengths != k_cache.shape[1]).any()), "cache that is not full")
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=shared).transpose(1, 2)


def flash_attn(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = None,
    **others: Any,
) -> Tensor:
    """FlashAttention 2 over a cache, split over keys."""
    from flash_attn import flash_attn_with_kvcache

    refuse(q.dtype not in (torch.float16, torch.bfloat16), "kernel but for float16 and bfloat16")
    refuse_given(others)
    return flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=lengths,
        block_table=block_table,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else window,
        softcap=softcap,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.float(),
        num_splits=num_splits or 0,
    )


PEERS = {
    "decode_attention": (
        Peer("SDPA", TORCH, sdpa, "takes all caches to be full; heads before time, as a transposed view"),
        Peer("flash_attn", FLASH_ATTN, flash_attn, gradients=False),
    )
}
