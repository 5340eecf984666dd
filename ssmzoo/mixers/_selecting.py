"""What mixers have in common in which each query selects the blocks of keys that it sees, by summaries of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision
from ssmzoo.cache import KVCache, append, borders, positions
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._heads import HeadOptions, heads_of_width
from ssmzoo.mixers._rope import rotary_angles, rotate


@dataclasses.dataclass
class SummaryCache(KVCache):
    """A :class:`~ssmzoo.cache.kv.KVCache` of all tokens, and summaries of its complete stretches of tokens.

    Attributes:
        summaries: ``(s, n, h', d')``: of each sequence as many as it has complete stretches, and then numbers without
            meaning, up to those of the longest one.
    """

    summaries: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))


@dataclasses.dataclass(kw_only=True)
class SelectingOptions(HeadOptions):
    """Options of all of them, beside those of :class:`~ssmzoo.mixers._heads.HeadOptions`.

    Attributes:
        n_kv_heads: heads of keys and values; as many as of queries if None.
        rope: rotary position embedding (arXiv 2104.09864), in the rotate-half form.
        rope_base: its base.
    """

    n_kv_heads: int | None = None
    rope: bool = True
    rope_base: float = 10000.0


class SelectingAttention(Mixer):
    """Causal softmax attention to blocks of keys that each query selects by itself.

    A subclass makes summaries of stretches of ``stretch`` tokens, which begin ``stride`` tokens apart, and attends.

    Args:
        d_model: width of input and output.
        options: those of the subclass.
        copies: of the heads of keys and values, each with weights of its own.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = SelectingOptions
    state_class = SummaryCache
    stretch: int
    stride: int

    def __init__(self, d_model: int, options: SelectingOptions, copies: int = 1):
        super().__init__(d_model)
        name, o = type(self).__name__, options
        self.check_at_least(1, head_dim=o.head_dim, n_heads=o.n_heads, n_kv_heads=o.n_kv_heads)
        self.head_dim, self.rope, self.rope_base = o.head_dim, o.rope, o.rope_base
        self.n_heads = heads_of_width(name, d_model, o.head_dim, o.n_heads)
        self.n_kv_heads = self.n_heads if o.n_kv_heads is None else o.n_kv_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{name}: `n_kv_heads` must divide the {self.n_heads} heads; got {self.n_kv_heads}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"{name}: `head_dim` must be even, or `rope` false; got {self.head_dim}")
        if self.rope and self.rope_base <= 1:
            raise ValueError(f"{name}: `rope_base` must be above 1; got {self.rope_base}")
        self.copies = copies
        self.q_proj = Linear(d_model, self.n_heads * self.head_dim, bias=o.bias)
        self.k_proj, self.v_proj = (
            Linear(d_model, self.copies * self.n_kv_heads * self.head_dim, bias=o.bias) for _ in range(2)
        )
        self.out_proj = Linear(self.n_heads * self.head_dim, d_model, bias=o.out_bias)

    def summarise(self, k: Tensor, v: Tensor) -> Tensor:
        """Summaries ``(b, n, h', d')`` of all complete stretches of keys and values ``(b, m, copies · h_kv, d)``."""
        raise NotImplementedError

    def no_summaries(self, batch_size: int) -> Tensor:
        """What :meth:`summarise` gives of no tokens, ``(batch_size, 0, h', d')``, without a call of any map."""
        raise NotImplementedError

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, summaries: Tensor) -> Tensor:
        """The newest tokens x ``(b, l, d_model)``, q ``(b, l, h, d)``, over all tokens so far: ``(b, l, h, d)``."""
        raise NotImplementedError

    def complete(self, length: int) -> int:
        """How many stretches are complete within the first ``length`` tokens."""
        return max(0, (length - self.stretch) // self.stride + 1)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> SummaryCache:
        self.check_has_state()
        shape = (batch_size, self.copies * self.n_kv_heads, self.head_dim, self.head_dim)
        state = SummaryCache.empty(self.like(), shape, max_length or 0, None)
        return dataclasses.replace(state, summaries=self.no_summaries(batch_size))

    def mix(
        self, x: Tensor, state: SummaryCache | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, SummaryCache | None]:
        packed = borders(x, state, cu_seqlens, few=0)
        if packed is not None:
            y, state = self.mix(x.reshape(1, -1, self.d_model), state, packed)
            return y.view_as(x), state
        places = positions(x, state, cu_seqlens)
        q, k = (self._turned(projection(x), places) for projection in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if state is not None:
            earlier, earlier_of_each = state.longest, [] if cu_seqlens is None else state.held.tolist()
            append(state, k, v, cu_seqlens, q)
        if cu_seqlens is not None:
            if state is not None:
                self._extend_each(state, earlier_of_each)
            outs = [q[:, :0]]
            for sequence, span in spans(cu_seqlens):
                keys, values = k[:, span], v[:, span]
                if state is None:
                    summaries = self.summarise(keys, values)
                else:
                    length = int(state.held[sequence])
                    one = slice(sequence, sequence + 1)
                    keys, values = (t[one, :length] for t in (state.keys, state.values))
                    summaries = state.summaries[one, : self.complete(length)]
                outs.append(self.attend(x[:, span], q[:, span], keys, values, summaries))
            out = torch.cat(outs, dim=1)
        elif state is None:
            out = self.attend(x, q, k, v, self.summarise(k, v))
        else:
            self._extend(state, earlier)
            keys, values, _ = state.recent(x.shape[1], -1)
            out = self.attend(x, q, keys, values, state.summaries)
        return self.out_proj(out.flatten(2)), state

    def _turned(self, heads: Tensor, places: Tensor) -> Tensor:
        """Queries or keys (b l h·d) by heads (b l h d), turned by their places (b or 1, l)."""
        heads = heads.unflatten(-1, (-1, self.head_dim))
        if not self.rope:
            return heads
        return rotate(heads, *rotary_angles(places, self.head_dim, self.rope_base, precision(heads), None))

    def _extend(self, state: SummaryCache, before: int) -> None:
        """Summaries of the stretches that are complete since there were ``before`` tokens, in all sequences alike."""
        state.summaries = state.summaries[:, : self.complete(before)]  # there are more if a longer sequence was dropped
        if self.complete(state.longest) > self.complete(before):
            new = self._new(state, slice(None), before, state.longest)
            state.summaries = torch.cat([state.summaries.to(new.dtype), new], dim=1)

    def _extend_each(self, state: SummaryCache, before: list[int]) -> None:
        """Likewise in each sequence by itself."""
        now = state.held.tolist()
        counts = [self.complete(length) for length in now]
        if counts == [self.complete(length) for length in before]:
            return
        rows = []
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            row = state.summaries[i : i + 1, : self.complete(old)]
            if self.complete(new) > self.complete(old):
                row = torch.cat([row, self._new(state, slice(i, i + 1), old, new)], dim=1)
            filled = row.new_zeros(1, max(counts) - row.shape[1], *row.shape[2:])
            rows.append(torch.cat([row, filled], dim=1))
        state.summaries = torch.cat(rows)

    def _new(self, state: SummaryCache, rows: slice, before: int, now: int) -> Tensor:
        first, end = self.complete(before) * self.stride, (self.complete(now) - 1) * self.stride + self.stretch
        return self.summarise(state.keys[rows, first:end], state.values[rows, first:end])
