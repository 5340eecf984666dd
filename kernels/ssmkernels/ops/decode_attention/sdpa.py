"""Attention over a cache on the CPU through PyTorch's ``scaled_dot_product_attention``, cut to its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.attention import hidden, sdpa
from ssmkernels.ops.decode_attention import reference


def unsupported(a: Any) -> str | None:
    if a.block_table is not None:
        return "PyTorch's attention has no pages"
    if a.lengths.device.type != "cpu":
        return "it reads the lengths on the host, which would hold up a GPU"
    return sdpa.unsupported(a)


def compute(a: Any) -> tuple[Tensor, Tensor]:
    def part(rows: slice, length: int) -> Tensor:
        k, v = a.k_cache[rows, :length], a.v_cache[rows, :length]
        return sdpa.one_batch(a.q[rows], k, v, a.left, 0, a.scale, a.alibi_slopes)

    each = a.lengths.tolist()
    if len(set(each)) <= 1:
        out = part(slice(None), max(each, default=0))
    else:
        out = torch.cat([part(slice(i, i + 1), length) for i, length in enumerate(each)])
    # Not with gradients: to record both ways would change the last digits of those of other sequences
    if not out.requires_grad and (a.left >= 0 or a.q.shape[1] > 1) and hidden.spread(out):
        out = hidden.repaired(out, reference.compute(a)[0])
    return out.contiguous(), a.q.new_empty(0, dtype=precision(a.q))
