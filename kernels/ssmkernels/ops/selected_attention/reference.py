"""Attention to selected blocks as its formula stands: softmax attention under a mask of all queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.ops.attention.reference import attend, distances


def compute(a: Any) -> tuple[Tensor, Tensor]:
    l, m, groups = a.q.shape[1], a.k.shape[1], a.q.shape[2] // a.blocks.shape[2]
    count = -(-m // a.block_size)
    block = torch.where((a.blocks >= 0) & (a.blocks < count), a.blocks, count).long()
    chosen = torch.zeros(*block.shape[:3], count + 1, dtype=torch.bool, device=block.device).scatter(3, block, True)
    seen = chosen.repeat_interleave(a.block_size, dim=3)[..., :m]  # (b l g m): the last block of all is none
    seen = seen.transpose(1, 2).repeat_interleave(groups, dim=1)  # (b h l m)
    distance = distances(l, m, a.q.device)
    out, lse = attend(a.q, a.k, a.v, distance, seen & (distance <= 0), a.scale, 0.0, None, None)
    return out, lse if a.return_lse else lse.new_empty(0)
