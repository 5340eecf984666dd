"""Attention by the CUDA kernels of the package flash_attn, version 2.6 or later (Dao 2023, arXiv 2307.08691).

Written against the package's published signatures and tested with stand-ins for them; it has not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core import external
from ssmkernels.core.library import wants_graph
from ssmkernels.core.validate import HALF, precision

WIDEST = 256  # head dim


def missing() -> str | None:
    return external.missing("flash_attn")


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    q = arguments["q"]
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "a GPU older than Ampere"
    return external.wrong_device("q", q) or lacking(arguments)


def lacking(arguments: Mapping[str, Any]) -> str | None:
    """What the package has not that a call needs, wherever its tensors are; None where it has all."""
    q, k, v, slopes = (arguments[name] for name in ("q", "k", "v", "alibi_slopes"))
    if q.dtype not in HALF:
        return "precisions but float16 and bfloat16"
    if arguments["sinks"] is not None:
        return "sinks"
    if arguments["block_offsets"] is not None:
        return "block masks"
    if v.shape[3] != q.shape[3]:
        return "values of another head dim than the keys"
    if q.shape[3] > WIDEST:
        return f"head dims above {WIDEST}"
    if q.numel() == 0 or k.numel() == 0:
        return "empty inputs"
    if arguments["return_lse"] and wants_graph(q, k, v):
        return "the gradient of the log-sum-exp"
    if slopes is not None and wants_graph(slopes):
        return "the gradient of `alibi_slopes`"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    block_offsets: Tensor | None,
    block_columns: Tensor | None,
    block_patterns: Tensor | None,
    block_bits: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = call(q, k, v, left, right, scale, softcap, alibi_slopes, cu_seqlens, cu_seqlens_k, return_lse)
    external.without_second_derivative("flash_attn", out)
    if lse is None:
        return out, q.new_empty(0, dtype=precision(q))
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # theirs where a query sees nothing


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The package's own functions: out (b l h v) and, if wanted, its log-sum-exp (b h l)."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if scale <= 0:  # it hides a key before it scales the logits
        q, scale = q * scale, 1.0
    options = {
        "softmax_scale": scale,
        "causal": right == 0,
        "window_size": (left, right),
        "softcap": softcap,
        "alibi_slopes": None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        "deterministic": True,
        "return_attn_probs": return_lse,
    }
    if cu_seqlens is None or cu_seqlens_k is None:
        found = flash_attn_func(q, k, v, **options)
        return (found[0], found[1]) if return_lse else (found, None)
    longest = (int(borders.diff().max()) for borders in (cu_seqlens, cu_seqlens_k))
    borders = (cu_seqlens.contiguous(), cu_seqlens_k.contiguous())
    found = flash_attn_varlen_func(q[0], k[0], v[0], *borders, *longest, **options)
    return (found[0][None], found[1][None]) if return_lse else (found[None], None)
