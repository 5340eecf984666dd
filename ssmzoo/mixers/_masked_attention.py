"""What the mixers of sparse attention have in common: softmax attention to the keys that a pattern shows."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ssmkernels import attention
from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision
from ssmzoo.cache import FEW, KVCache, append, borders, positions
from ssmzoo.linear import Linear
from ssmzoo.mixers._heads import HeadMixer, HeadOptions
from ssmzoo.mixers._pattern import Pattern, mask_of
from ssmzoo.mixers._rope import rotary_angles, rotate
from ssmzoo.state import State


@dataclasses.dataclass(kw_only=True)
class MaskedAttentionOptions(HeadOptions):
    """Options of all mixers of sparse attention, beside those of :class:`~ssmzoo.mixers._heads.HeadOptions`.

    Attributes:
        rope: rotary position embedding (arXiv 2104.09864), in the rotate-half form; it takes the place of learned
            positions where a paper has these.
        rope_base: its base.
    """

    rope: bool = True
    rope_base: float = 10000.0


class MaskedAttention(HeadMixer):
    """Softmax attention to the keys that a pattern shows; which one says the mixer made of it.

    The time grows with the blocks that are visible. The state, where there is one, is a
    :class:`~ssmzoo.cache.kv.KVCache` of all tokens, unless the mixer says otherwise.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = MaskedAttentionOptions
    state_class: type[State] = KVCache
    pattern: Pattern

    def __init__(self, d_model: int, options: MaskedAttentionOptions):
        super().__init__(d_model, options)
        self.rope, self.rope_base = options.rope, options.rope_base
        if self.rope and self.head_dim % 2:
            raise ValueError(f"{type(self).__name__}: `head_dim` must be even, or `rope` false; got {self.head_dim}")
        if self.rope and self.rope_base <= 1:
            raise ValueError(f"{type(self).__name__}: `rope_base` must be above 1; got {self.rope_base}")

    def check_block_size(self, block_size: int) -> None:
        """Raises ValueError for a block that masks cannot have."""
        if block_size < 1 or block_size % 8:
            raise ValueError(f"{type(self).__name__}: `block_size` must be a multiple of 8; got {block_size}")

    def initial_state(self, batch_size: int, max_length: int | None = None) -> State:
        self.check_has_state()
        return self.empty_cache(batch_size, max_length or 0)

    def empty_cache(self, batch_size: int, capacity: int) -> KVCache:
        """The cache before the first token, with room for ``capacity``."""
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        return KVCache.empty(self.like(), shape, capacity, None)

    def mixing_flops(self, context: int) -> float:
        """4 · n_heads · head_dim for each key that a query sees, in the mean."""
        return 4 * self.n_heads * self.head_dim * self.pattern.seen(max(context, 1))

    def mix(self, x: Tensor, state: KVCache | None, cu_seqlens: Tensor | None) -> tuple[Tensor, KVCache | None]:
        packed = borders(x, state, cu_seqlens)
        if packed is not None:
            y, state = self.mix(x.reshape(1, -1, self.d_model), state, packed)
            return y.view_as(x), state
        places = positions(x, state, cu_seqlens)
        q, k = (self.turned(x, projection, places) for projection in (self.q_proj, self.k_proj))
        v = self.heads_of(x, self.v_proj)
        first = state is None or state.longest == 0
        if state is not None:
            append(state, k, v, cu_seqlens, q)
        if state is not None and not first:
            out = self._further(q, state, cu_seqlens)
        elif cu_seqlens is None:
            out = self.whole(x, places, q, k, v)
        else:
            outs = [self.whole(*(t[:, span] for t in (x, places, q, k, v))) for _, span in spans(cu_seqlens)]
            out = torch.cat([q[:, :0], *outs], dim=1)
        if state is not None:
            state.trim()
        return self.out_proj(out.flatten(2)), state

    def turned(self, x: Tensor, projection: Linear, places: Tensor) -> Tensor:
        """Queries or keys (b l h d) of x, turned by their places (b or 1, l)."""
        heads = self.heads_of(x, projection)
        if not self.rope:
            return heads
        return rotate(heads, *rotary_angles(places, self.head_dim, self.rope_base, precision(x), None))

    def whole(self, x: Tensor, places: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sequences from their beginnings: q, k and v (b l h d), from x at places (b or 1, l), to (b l h d)."""
        return masked(self.pattern, q, k, v)

    def _further(self, q: Tensor, cache: KVCache, cu_seqlens: Tensor | None) -> Tensor:
        """The next tokens of each sequence, over themselves and what the cache holds."""
        l, held = q.shape[1], cache.held
        if cu_seqlens is not None:
            outs = [q[:, :0]]
            for (sequence, span), length in zip(spans(cu_seqlens), held.tolist(), strict=True):
                one = slice(sequence, sequence + 1), slice(0, length)
                outs.append(_newest(self.pattern, q[:, span], cache.keys[one], cache.values[one]))
            return torch.cat(outs, dim=1)
        if l > FEW:
            return _newest(self.pattern, q, *cache.recent(l, -1)[:2])
        places = held[:, None] - l + torch.arange(l, device=q.device)
        return gathered(q, cache, *self.pattern.few(places, cache.longest))


def masked(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last queries of sequences, which begin with a block, (b l h d)."""
    out = attention(q, k, v, block_mask=mask_of(pattern, q.shape[1], k.shape[1], q.device))
    assert isinstance(out, Tensor)
    return out


def _newest(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Likewise, where the queries begin anywhere."""
    if not q.shape[1]:
        return q
    before = (k.shape[1] - q.shape[1]) % pattern.block  # queries that their first block has before them
    filled = torch.cat([q.new_zeros(q.shape[0], before, *q.shape[2:]), q], dim=1)
    return masked(pattern, filled, k, v)[:, before:]


def gathered(q: Tensor, cache: KVCache, keys: Tensor, seen: Tensor) -> Tensor:
    """A few queries (s l h d) over the keys at these places of the cache, and over no others: (s l h d).

    Args:
        keys, seen: as :meth:`Pattern.few` gives them; every query sees at least one.
    """
    row = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    head = torch.arange(q.shape[2], device=q.device)[:, None]
    place = keys.clamp(0, cache.longest - 1)
    wide = precision(q)
    k, v = (x[row, place, head].to(wide) for x in (cache.keys, cache.values))  # (s l h n d)
    with torch.autocast(q.device.type, enabled=False):  # it would round logits to half precision
        logits = torch.einsum("slhd,slhnd->slhn", q.to(wide), k) / math.sqrt(q.shape[3])
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("slhn,slhnd->slhd", weights, v).to(q.dtype)
