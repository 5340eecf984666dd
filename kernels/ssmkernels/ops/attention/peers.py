"""Other people's attention.

What needs a GPU is written against its published signature and has not been run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.bench.peers import FLASH_ATTN, TORCH, Peer, Setting, refuse
from ssmkernels.ops.attention._arguments import bounds
from ssmkernels.ops.attention.reference import distances, in_window


def refuse_given(options: Mapping[str, Any]) -> None:
    """Refuses a call where any of these options is given."""
    for name, value in options.items():
        refuse(isinstance(value, Tensor) or bool(value), f"`{name}`")


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which wants heads before time; under a window with a mask made before."""
    refuse_given(others)
    refuse(window is None and causal and q.shape[1] != k.shape[1], "causal mask aligned to the last key")
    mask = None if window is None else _mask(q.shape[1], k.shape[1], *bounds("SDPA", causal, window), q.device)
    refuse(mask is not None and not bool(mask.any(1).all()), "rows that see nothing")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    causal = causal and mask is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=1)
def _mask(l: int, m: int, left: int, right: int, device: torch.device) -> Tensor:
    return in_window(distances(l, m, device), left, right)


def flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """FlashAttention 2."""
    from flash_attn import flash_attn_func

    refuse(q.dtype not in (torch.float16, torch.bfloat16), "kernel but for float16 and bfloat16")
    refuse_given(others)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale=scale,
        causal=causal,
        window_size=(-1, -1) if window is None else window,
        softcap=softcap,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.float(),
    )


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
