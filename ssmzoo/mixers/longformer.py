"""Longformer: attention within a sliding window and to global tokens (Beltagy et al. 2020, arXiv 2004.05150)."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ssmkernels import attention, masks
from ssmkernels.masks import BlockMask
from ssmzoo.cache import KVCache
from ssmzoo.mixers._cached_heads import CachedHeadOptions
from ssmzoo.mixers._masked_attention import MaskedAttention, masked
from ssmzoo.mixers._pattern import Pattern
from ssmzoo.registry import register_mixer

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class LongformerPattern(Pattern):
    """Keys from ``left`` before a query to ``right`` after it, and ``n_global`` first ones.

    These see all, unless it is causal. The queries of a mask may begin anywhere.
    """

    left: int
    right: int
    n_global: int
    causal: bool

    def mask(self, q_len: int, k_len: int) -> BlockMask:
        shown = masks.window(q_len, k_len, left=self.left, right=self.right, block_size=self.block)
        shown = shown | masks.global_tokens(q_len, k_len, tokens=min(self.n_global, k_len), block_size=self.block)
        return shown & masks.causal(q_len, k_len, block_size=self.block) if self.causal else shown

    def seen(self, length: int) -> float:
        n_global = min(self.n_global, length)
        place = torch.arange(length)
        low, high = (place - self.left).clamp(min=0), (place + self.right).clamp(max=length - 1)
        keys = high - low + 1 + low.clamp(max=n_global)
        if not self.causal:
            keys += (n_global - 1 - high).clamp(min=0)
            keys[:n_global] = length
        return float(keys.double().mean())

    def few(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        steps = torch.arange(-min(self.left, longest), 1, device=positions.device)
        near = positions[..., None] + steps  # (s l n)
        first = torch.arange(min(self.n_global, longest), device=positions.device).expand(*positions.shape, -1)
        keys = torch.cat([first, near], dim=-1)
        seen = torch.cat([first <= positions[..., None], near >= self.n_global], dim=-1)
        return keys[:, :, None], seen[:, :, None]


@dataclasses.dataclass
class LongformerCache(KVCache):
    """A :class:`~ssmzoo.cache.kv.KVCache` that drops none of a sequence's first ``n_global`` tokens.

    They lie before the others, and count in ``keep``. What is held of a sequence is to the pattern a shorter sequence:
    it lacks only tokens that no window reaches any more.
    """

    n_global: int = 0

    def _newest(self, x: Tensor, first: Tensor, keep: int) -> Tensor:
        recent = super()._newest(x, first + self.n_global, keep - self.n_global)
        return torch.cat([x[:, : self.n_global], recent], dim=1)


@dataclasses.dataclass(kw_only=True)
class LongformerOptions(CachedHeadOptions):
    """Beside those of :class:`~ssmzoo.mixers._cached_heads.CachedHeadOptions`.

    Attributes:
        window: w, even if bidirectional: half of it lies on each side of a token.
        n_global: how many of a sequence's first tokens are global.
        global_projections: whether global tokens have projections of their own; as in the paper unless causal if None.
        bidirectional: every token sees later ones too; there is then no state. The paper's encoder is.
    """

    window: int = 512
    n_global: int = 1
    global_projections: bool | None = None
    bidirectional: bool = True


@register_mixer("longformer")
class Longformer(MaskedAttention):
    """Softmax attention within a sliding window, and to and from the first tokens of the sequence: linear in length.

    It approximates softmax attention by leaving out pairs of distant tokens, unless one of them is global. With S(i)
    the keys that token i sees (section 3.1)::

        out_i = Σ_{j ∈ S(i)} softmax_j(q_i · k_j / √d) v_j
        S(i) = {j : |i - j| ≤ window / 2} ∪ {j : j < n_global}        or all j, where i < n_global

    Global tokens see through queries, keys and values of projections of their own, which start as copies of the usual
    ones (section 3.1, "Linear projections for global attention"); the others see them by the usual ones, as in the
    published code. Dilated windows are left out. The causal form sees ``window`` tokens, the query itself included,
    and the global ones before it; a global token then sees nothing that others would not, and has no projections of its
    own.

    Args:
        d_model: width of input and output.
        options: those of :class:`LongformerOptions`.

    Its state is a :class:`LongformerCache`: it keeps the global tokens, what the window can still reach, and about as
    much again, however many tokens come.

    Raises:
        ValueError: sizes or options that do not fit together.
    """

    options_class = LongformerOptions
    state_class = LongformerCache

    def __init__(self, d_model: int, **options: Any):
        o = LongformerOptions(**options)
        super().__init__(d_model, o)
        self.check_at_least(1, window=o.window)
        self.check_at_least(0, n_global=o.n_global)
        if o.bidirectional and o.window % 2:
            raise ValueError(f"Longformer: `window` must be even, half of it for each side; got {o.window}")
        own = o.bidirectional and o.n_global > 0 if o.global_projections is None else o.global_projections
        if own and (not o.bidirectional or o.n_global == 0):
            raise ValueError(
                "Longformer: `global_projections` needs `bidirectional` and `n_global` of at least 1; got "
                f"bidirectional={o.bidirectional} and n_global={o.n_global}"
            )
        left, right = (o.window // 2, o.window // 2) if o.bidirectional else (o.window - 1, 0)
        self.n_global, self.global_projections = o.n_global, own
        self.pattern: LongformerPattern = LongformerPattern(BLOCK, 1, left, right, o.n_global, self.causal)
        if own:
            self.q_global_proj, self.k_global_proj, self.v_global_proj = (
                copy.deepcopy(usual) for usual in (self.q_proj, self.k_proj, self.v_proj)
            )

    def empty_cache(self, batch_size: int, capacity: int) -> LongformerCache:
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        cache = LongformerCache.empty(self.like(), shape, capacity, self.n_global + self.pattern.left)
        return dataclasses.replace(cache, n_global=self.n_global)

    def mixing_flops(self, context: int) -> float:
        """As of all such mixers, less the queries that ``q_global_proj`` does not make: most tokens are not global."""
        flops = super().mixing_flops(context)
        if self.global_projections:
            flops -= 2 * self.q_global_proj.weight.numel() * max(0, 1 - self.n_global / max(context, 1))
        return flops

    def whole(self, x: Tensor, places: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.global_projections:
            return super().whole(x, places, q, k, v)
        n = self.n_global
        others = masked(self.pattern, q[:, n:], k, v)  # they are the last ones
        q = self.turned(x[:, :n], self.q_global_proj, places[:, :n])
        k, v = self.turned(x, self.k_global_proj, places), self.heads_of(x, self.v_global_proj)
        seeing_all = attention(q, k, v)
        assert isinstance(seeing_all, Tensor)
        return torch.cat([seeing_all, others], dim=1)
