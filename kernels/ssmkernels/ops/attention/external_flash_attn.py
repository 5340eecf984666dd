"""Attention by the CUDA kernels of the package flash_attn, version 2.6 or later (Dao 2023, arXiv 2307.08691).

Written against the package's published signatures and tested with stand-ins for them; it has not been run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core import external
from ssmkernels.core.library import wants_graph
from ssmkernels.core.validate import HALF, precision

WIDEST = 256  # head dim


def missing() -> str | None:
    return external.missing("flash_attn")


def unsupported(a: Any) -> str | None:
    if a.q.is_cuda and torch.cuda.get_device_capability(a.q.device) < (8, 0):
        return "a GPU older than Ampere"
    return external.wrong_device(a) or lacking(a)


def lacking(a: Any) -> str | None:
    """What the package lacks that a call needs, wherever its tensors are; None where it has all."""
    q, k, v = a.q, a.k, a.v
    if q.dtype not in HALF:
        return "precisions but float16 and bfloat16"
    if a.sinks is not None:
        return "sinks"
    if a.block_offsets is not None:
        return "block masks"
    if a.q_positions is not None:
        return "positions of the tokens' own"
    if v.shape[3] != q.shape[3]:
        return "values of another head dim than the keys"
    if q.shape[3] > WIDEST:
        return f"head dims above {WIDEST}"
    if q.numel() == 0 or k.numel() == 0:
        return "empty inputs"
    if a.return_lse and wants_graph(q, k, v):
        return "the gradient of the log-sum-exp"
    if wants_graph(a.alibi_slopes):
        return "the gradient of `alibi_slopes`"
    return None


def compute(a: Any) -> tuple[Tensor, Tensor]:
    out, lse = call(a)
    external.without_second_derivative("flash_attn", out)
    if lse is None:
        return out, a.q.new_empty(0, dtype=precision(a.q))
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # theirs where a query sees nothing


def call(a: Any) -> tuple[Tensor, Tensor | None]:
    """The package's own functions: out (b l h v) and, if wanted, its log-sum-exp (b h l)."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, scale = (a.q * a.scale, 1.0) if a.scale <= 0 else (a.q, a.scale)  # it hides a key before it scales the logits
    options = {
        "softmax_scale": scale,
        "causal": a.right == 0,
        "window_size": (a.left, a.right),
        "softcap": a.softcap,
        "alibi_slopes": None if a.alibi_slopes is None else a.alibi_slopes.float().contiguous(),
        "deterministic": True,
        "return_attn_probs": a.return_lse,
    }
    if a.cu_seqlens is None:
        found = flash_attn_func(q, a.k, a.v, **options)
        return (found[0], found[1]) if a.return_lse else (found, None)
    borders = (a.cu_seqlens.contiguous(), a.cu_seqlens_k.contiguous())
    longest = (int(each.diff().max()) for each in borders)
    found = flash_attn_varlen_func(q[0], a.k[0], a.v[0], *borders, *longest, **options)
    return (found[0][None], found[1][None]) if a.return_lse else (found[None], None)
