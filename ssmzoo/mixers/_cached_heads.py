"""What mixers of softmax attention over a cache have in common: rotary heads, the cache, and when it is read."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision
from ssmzoo.cache import KVCache, append, borders, positions
from ssmzoo.linear import Linear
from ssmzoo.mixers._heads import HeadMixer, HeadOptions
from ssmzoo.mixers._rope import rotary_angles, rotate
from ssmzoo.state import State


@dataclasses.dataclass(kw_only=True)
class CachedHeadOptions(HeadOptions):
    """Options of all of them, beside those of :class:`~ssmzoo.mixers._heads.HeadOptions`.

    Attributes:
        rope: rotary position embedding (arXiv 2104.09864), in the rotate-half form; it takes the place of learned
            positions where a paper has these.
        rope_base: its base.
    """

    rope: bool = True
    rope_base: float = 10000.0


class Newest(NamedTuple):
    """The newest tokens, as :meth:`CachedHeads.attend` gets them.

    Attributes:
        x: (b l d_model).
        places: their positions, (b or 1, l).
        q, k, v: (b l h d).
        first: whether there are no earlier tokens.
        cu_seqlens: borders of packed sequences.
        extra: what :meth:`CachedHeads.project` adds.
    """

    x: Tensor
    places: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    first: bool
    cu_seqlens: Tensor | None
    extra: Any


class CachedHeads(HeadMixer):
    """Softmax attention in some form, :meth:`attend`, of the newest tokens to all tokens so far.

    The state, where there is one, is a :class:`~ssmzoo.cache.kv.KVCache` of all tokens, unless the mixer says
    otherwise.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = CachedHeadOptions
    state_class: type[State] = KVCache

    def __init__(self, d_model: int, options: CachedHeadOptions):
        super().__init__(d_model, options)
        self.rope, self.rope_base = options.rope, options.rope_base
        if self.rope and self.head_dim % 2:
            raise ValueError(f"{type(self).__name__}: `head_dim` must be even, or `rope` false; got {self.head_dim}")
        if self.rope and self.rope_base <= 1:
            raise ValueError(f"{type(self).__name__}: `rope_base` must be above 1; got {self.rope_base}")

    def initial_state(self, batch_size: int, max_length: int | None = None) -> State:
        self.check_has_state()
        return self.empty_cache(batch_size, max_length or 0)

    def empty_cache(self, batch_size: int, capacity: int) -> KVCache:
        """The cache before the first token, with room for ``capacity``."""
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        return KVCache.empty(self.like(), shape, capacity, None)

    def cache_of(self, state: Any) -> KVCache | None:
        """The keys and values in a state."""
        return state

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        cache = self.cache_of(state)
        packed = borders(x, cache, cu_seqlens)
        if packed is not None:
            y, state = self.mix(x.reshape(1, -1, self.d_model), state, packed)
            return y.view_as(x), state
        places = positions(x, cache, cu_seqlens)
        q, k, v, extra = self.project(x, places)
        first = cache is None or cache.longest == 0
        if cache is not None:
            append(cache, k, v, cu_seqlens, q)
        out = self.attend(Newest(x, places, q, k, v, first, cu_seqlens, extra), state)
        if cache is not None:
            cache.trim()
        return self.out_proj(out.flatten(2)), state

    def project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """q, k and v (b l h d) of tokens x at places (b or 1, l), and what else :meth:`attend` is to know."""
        q, k = (self.turned(x, projection, places) for projection in (self.q_proj, self.k_proj))
        return q, k, self.heads_of(x, self.v_proj), None

    def attend(self, new: Newest, state: Any) -> Tensor:
        """Heads' outputs (b l h d) of the newest tokens, whose keys and values the state's cache holds already."""
        if not new.first:
            return self.further(new.q, state, new.cu_seqlens)
        tensors = (new.x, new.places, new.q, new.k, new.v)
        if new.cu_seqlens is None:
            return self.whole(*tensors)
        outs = [self.whole(*(t[:, span] for t in tensors)) for _, span in spans(new.cu_seqlens)]
        return torch.cat([new.q[:, :0], *outs], dim=1)

    def whole(self, x: Tensor, places: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sequences from their beginnings: q, k and v (b l h d), from x at places (b or 1, l), to (b l h d)."""
        raise NotImplementedError

    def further(self, q: Tensor, cache: KVCache, cu_seqlens: Tensor | None) -> Tensor:
        """The next tokens of each sequence, q (b l h d), over themselves and what the cache holds."""
        raise NotImplementedError

    def turned(self, x: Tensor, projection: Linear, places: Tensor) -> Tensor:
        """Queries or keys (b l h d) of x, turned by their places (b or 1, l)."""
        heads = self.heads_of(x, projection)
        if not self.rope:
            return heads
        return rotate(heads, *rotary_angles(places, self.head_dim, self.rope_base, precision(x), None))
