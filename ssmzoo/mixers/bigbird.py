"""BigBird: attention to neighbouring, global and random blocks (Zaheer et al. 2020, arXiv 2007.14062)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ssmkernels import masks
from ssmkernels.masks import BlockMask
from ssmzoo.mixers._cached_heads import CachedHeadOptions
from ssmzoo.mixers._masked_attention import MaskedAttention
from ssmzoo.mixers._pattern import Pattern
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(frozen=True)
class BigBirdPattern(Pattern):
    """By numbers of blocks: a window around the own one, the first and last ones, and random ones beside them.

    Masks are of whole sequences: ``q_len`` is ``k_len``.
    """

    window: int
    n_global: int
    n_random: int
    seed: int

    def mask(self, q_len: int, k_len: int) -> BlockMask:
        block = torch.arange(-(-k_len // self.block))
        first, last = self._ends(len(block))
        is_global = (block < first) | (block >= last)
        near = (block - block[:, None]).abs() <= self.window // 2
        visible = near | is_global | is_global[:, None]
        fixed = masks.whole_blocks(q_len, k_len, visible=visible[None], block_size=self.block)
        random = masks.random_blocks(
            q_len, k_len, count=self.n_random, heads=self.heads, seed=self.seed, beside=fixed, block_size=self.block
        )
        return fixed | random

    def seen(self, length: int) -> float:
        """In whole blocks, as if the last were as long as the others."""
        block = torch.arange(-(-length // self.block))
        first, last = self._ends(len(block))
        low, high = block - self.window // 2, block + self.window // 2
        low, high = low.clamp(min=0), high.clamp(max=len(block) - 1)
        blocks = high - low + 1 + low.clamp(max=first) + (len(block) - 1 - high).clamp(max=len(block) - last)
        blocks = (blocks + self.n_random).clamp(max=len(block))
        blocks[:first], blocks[last:] = len(block), len(block)
        return min(self.block * float(blocks.double().mean()), length)

    def _ends(self, blocks: int) -> tuple[int, int]:
        """The first block that is not global, and the first one behind it that is again."""
        return (self.n_global + 1) // 2, max(0, blocks - self.n_global // 2)


@dataclasses.dataclass(kw_only=True)
class BigBirdOptions(CachedHeadOptions):
    """Beside those of :class:`~ssmzoo.mixers._cached_heads.CachedHeadOptions`.

    Attributes:
        block_size: tokens of a block, a multiple of 8.
        window_blocks: blocks around the queries' own, itself included; odd.
        global_blocks: blocks that see all and are seen by all; the odd one at the beginning.
        random_blocks: blocks drawn for each block of queries.
        seed: of the draws; layers should differ in it, or share their graph.
    """

    block_size: int = 64
    window_blocks: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0


@register_mixer("bigbird")
class BigBird(MaskedAttention):
    """Softmax attention to neighbouring, global and random blocks of keys, never causal: linear in length.

    It approximates softmax attention by a sparse graph whose random edges keep any two tokens a few steps apart. With
    N(r) the blocks of keys that a block of queries sees (equation AT and appendix D, in the form that makes tokens of
    the sequence itself global, ITC)::

        out_i = Σ_{j in N(r)} softmax_j(q_i · k_j / √d) v_j            for i in block r
        N(r) = {c : |r - c| ≤ window_blocks // 2} ∪ global ∪ random_h(r)        or all c, where r is global

    Of the global blocks half begin the sequence and half end it, as in the published code. The random ones are drawn
    for each head and row from those that are not visible anyway; the same seed and length give the same ones.

    Args:
        d_model: width of input and output.
        options: those of :class:`BigBirdOptions`.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = BigBirdOptions
    causal = False
    has_state = False

    def __init__(self, d_model: int, **options: Any):
        o = BigBirdOptions(**options)
        super().__init__(d_model, o)
        self.check_block_size(o.block_size)
        self.check_at_least(1, window_blocks=o.window_blocks)
        self.check_at_least(0, global_blocks=o.global_blocks, random_blocks=o.random_blocks)
        if o.window_blocks % 2 == 0:
            raise ValueError(f"BigBird: `window_blocks` must be odd, as many on each side; got {o.window_blocks}")
        self.pattern = BigBirdPattern(
            o.block_size, self.n_heads, o.window_blocks, o.global_blocks, o.random_blocks, o.seed
        )
