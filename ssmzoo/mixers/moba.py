"""Mixture of block attention (Lu et al. 2025, arXiv 2502.13189)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ssmkernels import selected_attention
from ssmkernels.core.autocast import without_autocast
from ssmkernels.core.validate import precision
from ssmkernels.ops.selected_attention.selection import best
from ssmzoo.mixers._selecting import SelectingAttention, SelectingOptions
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class MobaOptions(SelectingOptions):
    """Beside those of :class:`~ssmzoo.mixers._selecting.SelectingOptions`.

    Attributes:
        block_size: tokens of a block.
        top_k: blocks that a query sees, its own included.
    """

    block_size: int = 512
    top_k: int = 3


@register_mixer("moba")
class Moba(SelectingAttention):
    """Causal softmax attention of each head to its query's own block, and to the blocks whose mean key fits it best.

    It approximates softmax attention by leaving out blocks. With the blocks c of ``block_size`` tokens (equations 4 to
    6 and section 2.2)::

        s_c   = q_t · mean_{j in block c} k_j                       for the complete blocks before the query's own
        S(t)  = {j ≤ t : j in the own block, or in one of the top_k - 1 blocks of the largest s_c}
        out_t = Σ_{j ∈ S(t)} softmax_j(q_t · k_j / √d) v_j

    The choice has no gradient; it learns through what the keys and queries of the chosen blocks do. With as many blocks
    as ``top_k`` or fewer, it is softmax attention: a model can be trained with either, and change.

    Args:
        d_model: width of input and output.
        options: those of :class:`MobaOptions`.

    Its state is a :class:`~ssmzoo.mixers._selecting.SummaryCache`: all keys and values, and the mean keys of blocks.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = MobaOptions

    def __init__(self, d_model: int, **options: Any):
        o = MobaOptions(**options)
        super().__init__(d_model, o)
        self.check_at_least(1, block_size=o.block_size, top_k=o.top_k)
        self.top_k, self.stretch, self.stride = o.top_k, o.block_size, o.block_size

    def mixing_flops(self, context: int) -> float:
        """4 d for each key that a query sees, and 2 d for each block that it looks at, by head."""
        seen = min((context + 1) / 2, (self.top_k - 0.5) * self.stretch)
        return self.n_heads * self.head_dim * (4 * seen + 2 * (context / self.stretch) / 2)

    def summarise(self, k: Tensor, v: Tensor) -> Tensor:
        count = self.complete(k.shape[1])
        blocks = k.detach()[:, : count * self.stretch].unflatten(1, (count, self.stretch))
        return blocks.to(precision(k)).mean(2)

    def no_summaries(self, batch_size: int) -> Tensor:
        return self.like(wide=True).new_zeros(batch_size, 0, self.n_kv_heads, self.head_dim)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, summaries: Tensor) -> Tensor:
        blocks = self.selected(q.detach(), summaries, k.shape[1])
        out = selected_attention(q, k, v, blocks, block_size=self.stretch)
        assert isinstance(out, Tensor)
        return out

    def selected(self, q: Tensor, means: Tensor, length: int) -> Tensor:
        """int32 ``(b, l, h, top_k)``: the blocks that the newest queries of ``length`` tokens see, their own first."""
        own = torch.arange(length - q.shape[1], length, device=q.device) // self.stretch  # (l)
        grouped = q.to(means.dtype).unflatten(2, (self.n_kv_heads, -1))
        with without_autocast(q.device.type):
            scores = torch.einsum("blcgd,bncd->blcgn", grouped, means).flatten(2, 3)
        later = torch.arange(means.shape[1], device=q.device) >= own[:, None, None]  # (l 1 n)
        others = best(scores.masked_fill(later, -torch.inf), self.top_k - 1)
        own = own.int()[:, None, None].expand(*others.shape[:3], 1)
        return torch.cat([own, others], dim=3)
