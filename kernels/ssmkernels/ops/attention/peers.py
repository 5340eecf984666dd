"""Other people's attention.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import FLASH_ATTN, TORCH, Peer, Setting, calls_like, refuse
from ssmkernels.ops.attention._arguments import bounds
from ssmkernels.ops.attention.reference import distances, in_window


@calls_like("attention", takes="causal window scale")
def sdpa(a: Any) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which wants heads before time; under a window with a mask made before."""
    l, m = a.q.shape[1], a.k.shape[1]
    refuse(a.window is None and a.causal and l != m, "causal mask aligned to the last key")
    mask = None if a.window is None else _mask(l, m, *bounds("SDPA", a.causal, a.window), a.q.device)
    refuse(mask is not None and not bool(mask.any(1).all()), "rows that see nothing")
    q, k, v = (t.transpose(1, 2) for t in (a.q, a.k, a.v))
    shared = q.shape[1] != k.shape[1]
    causal = a.causal and mask is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=a.scale, enable_gqa=shared)
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=1)
def _mask(l: int, m: int, left: int, right: int, device: torch.device) -> Tensor:
    return in_window(distances(l, m, device), left, right)


@calls_like("attention", takes="causal window scale softcap alibi_slopes")
def flash_attn(a: Any) -> Tensor:
    """FlashAttention 2."""
    from flash_attn import flash_attn_func

    return flash_attn_func(a.q, a.k, a.v, causal=a.causal, **flash_options(a))


def flash_options(a: Any) -> dict[str, Any]:
    """Options of FlashAttention's functions, under their names there."""
    refuse(a.q.dtype not in (torch.float16, torch.bfloat16), "kernel but for float16 and bfloat16")
    return {
        "softmax_scale": a.scale,
        "window_size": (-1, -1) if a.window is None else a.window,
        "softcap": a.softcap,
        "alibi_slopes": None if a.alibi_slopes is None else a.alibi_slopes.float(),
    }


SETTINGS = {
    "attention": Setting(
        further=(
            {"l": 8192, "window": (255, 0)},
            {"l": 4096, "causal": False, "softcap": 50.0},  # what PyTorch has not: beside it the next one counts
            {"l": 4096, "causal": False, "softcap": 50.0, "mask": "eighth"},
        )
    )
}

PEERS = {
    "attention": (
        Peer("SDPA", TORCH, sdpa, "wants heads before time: our layout is handed over as a transposed view"),
        Peer("flash_attn", FLASH_ATTN, flash_attn),
    )
}
