"""Strided attention, its context sharded among the heads (S2-Attention, Lin et al. 2024, arXiv 2407.17678)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ssmkernels import masks
from ssmkernels.masks import BlockMask
from ssmzoo.mixers._cached_heads import CachedHeadOptions
from ssmzoo.mixers._masked_attention import MaskedAttention
from ssmzoo.mixers._pattern import Pattern
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(frozen=True)
class StridedPattern(Pattern):
    """The ``local`` latest blocks, and for head h those before whose number less h is a multiple of ``stride``."""

    stride: int
    local: int

    def mask(self, q_len: int, k_len: int) -> BlockMask:
        numbers = {"stride": self.stride, "local": self.local, "heads": self.heads}
        shown = masks.strided(q_len, k_len, **numbers, block_size=self.block)
        return shown & masks.causal(q_len, k_len, block_size=self.block)

    def seen(self, length: int) -> float:
        row = torch.arange(-(-length // self.block))
        queries = (length - row * self.block).clamp(max=self.block)
        before = row.clamp(max=self.local - 1)  # other blocks that are near
        shard = torch.arange(self.heads)[:, None] % self.stride
        far = ((row - before - shard + self.stride - 1) // self.stride).clamp(min=0)  # of as many blocks further away
        keys = queries * (queries + 1) // 2 + queries * self.block * (before + far)  # (h rows)
        return int(keys.sum()) / (self.heads * length)

    def few(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        device, rows = positions.device, -(-longest // self.block)
        own = (positions // self.block)[:, :, None, None]  # (s l 1 1)
        near = own - torch.arange(min(self.local, rows), device=device)
        head = torch.arange(self.heads, device=device)[:, None] % self.stride
        far = head + self.stride * torch.arange(-(-rows // self.stride), device=device)  # (h n)
        shape = (*positions.shape, self.heads, -1)
        blocks = torch.cat([near.expand(shape), far.expand(shape)], dim=-1)
        listed = torch.cat([(near >= 0).expand(shape), (far <= own - self.local).expand(shape)], dim=-1)
        keys = blocks[..., None] * self.block + torch.arange(self.block, device=device)  # (s l h n block)
        seen = listed[..., None] & (keys <= positions[:, :, None, None, None])
        return keys.flatten(3), seen.flatten(3)


@dataclasses.dataclass(kw_only=True)
class StridedOptions(CachedHeadOptions):
    """Beside those of :class:`~ssmzoo.mixers._cached_heads.CachedHeadOptions`.

    The defaults are what Phi-3-small was published with.

    Attributes:
        block_size: tokens of a block, a multiple of 8.
        local_blocks: blocks before the query that every head sees, its own included.
        stride: in blocks, of those further away.
    """

    block_size: int = 64
    local_blocks: int = 16
    stride: int = 8


@register_mixer("strided")
class Strided(MaskedAttention):
    """Causal softmax attention to the latest blocks, and to every ``stride``-th one before, others for each head.

    It approximates softmax attention by sharding the distant context among the heads: each keeps a part of it, and
    ``stride`` heads all of it (HHST, section 3; after Child et al. 2019, arXiv 1904.10509). For query block r, key
    block c and head h, c is seen where::

        0 ≤ r - c < local_blocks    or    c ≤ r and (c - h) mod stride = 0

    and within the block of the query itself what is not later. With fewer heads than ``stride``, some of what is far
    is seen by none. The time still grows with the square of the length, divided by the stride.

    Args:
        d_model: width of input and output.
        options: those of :class:`StridedOptions`.

    Its state is a :class:`~ssmzoo.cache.kv.KVCache` of all tokens for all heads; it drops nothing, though what
    is far and in none of its blocks a head will not see again.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = StridedOptions

    def __init__(self, d_model: int, **options: Any):
        o = StridedOptions(**options)
        super().__init__(d_model, o)
        self.check_block_size(o.block_size)
        self.check_at_least(1, local_blocks=o.local_blocks, stride=o.stride)
        self.pattern = StridedPattern(o.block_size, self.n_heads, o.stride, o.local_blocks)
