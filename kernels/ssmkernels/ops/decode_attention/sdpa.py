"""Attention over a cache on the CPU through PyTorch's ``scaled_dot_product_attention``, cut to its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.attention import hidden, sdpa
from ssmkernels.ops.decode_attention import reference


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    if arguments["block_table"] is not None:
        return "PyTorch's attention has no pages"
    if arguments["lengths"].device.type != "cpu":
        return "it reads the lengths on the host, which would hold up a GPU"
    return sdpa.unsupported({**arguments, "block_offsets": None})  # a cache has no block masks


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    left: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    num_splits: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    def part(rows: slice, length: int) -> Tensor:
        k, v = k_cache[rows, :length], v_cache[rows, :length]
        return sdpa.one_batch(q[rows], k, v, left, 0, scale, alibi_slopes)

    each = lengths.tolist()
    if len(set(each)) <= 1:
        out = part(slice(None), max(each, default=0))
    else:
        out = torch.cat([part(slice(i, i + 1), length) for i, length in enumerate(each)])
    if (left >= 0 or q.shape[1] > 1) and hidden.spread(out):
        rest = (lengths, block_table, left, scale, softcap, alibi_slopes, sinks, num_splits, return_lse)
        out = hidden.repaired(out, reference.decode_attention(q, k_cache, v_cache, *rest)[0])
    return out.contiguous(), q.new_empty(0, dtype=precision(q))
