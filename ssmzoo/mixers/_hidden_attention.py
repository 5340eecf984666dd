"""Attention over cached hidden states in place of keys and values (EL-attention, arXiv 2105.04779)."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.cache import FEW, Cache, Logits, append
from ssmzoo.cache.hidden import fold, unfold
from ssmzoo.linear import Linear, is_plain
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._rope import Scaling


class HiddenAttention(Mixer):
    """A few new tokens fold the key projection into their queries, and the value projection into their outputs."""

    head_dim: int
    n_heads: int
    n_kv_heads: int
    window: int | None
    rope_dim: int | None
    rope_base: float
    scaling: Scaling | None
    qk_norm: bool | str
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    gate_proj: Linear | None

    @property
    def logits(self) -> Logits:
        """What the ops are told beside queries, keys and values."""
        raise NotImplementedError

    @property
    def folds_up_to(self) -> float:
        """New tokens of a sequence up to which attention over cached hidden states takes fewer operations.

        Over m tokens, making keys and values of them takes 4 m d_model n_kv_heads head_dim operations, and each query
        then 4 m n_heads (d_model - head_dim) less than over the hidden states.
        """
        wider = self.n_heads * (self.d_model - self.head_dim)
        return self.d_model * self.n_kv_heads * self.head_dim / wider if wider > 0 else float("inf")

    def over_hidden(self, x: Tensor, cache: Cache, cu_seqlens: Tensor | None, logits: Logits) -> Tensor:
        """The next tokens of each sequence, over themselves and what the cache holds: hidden states."""
        l, first = x.shape[1], cache.longest == 0
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        new = x[:, :, None].to(q.dtype)
        append(cache, new, new[..., :0], cu_seqlens, q)
        if first:
            return logits.attention(q, *self._keys_values(new), cu_seqlens)
        folds = self.folds()
        if folds and cu_seqlens is None and l <= FEW:
            q = fold(q, self.k_proj, self.n_kv_heads)
            return unfold(cache.decode(q, logits), self.v_proj, self.n_kv_heads)
        if cu_seqlens is not None:
            kept, _, cu_seqlens_k = cache.packed(cu_seqlens.diff() > 0)
            few = l <= self.folds_up_to * cache.n_sequences
        else:
            kept, cu_seqlens_k = cache.recent(l, -1 if self.window is None else self.window - 1)[0], None
            few = l <= self.folds_up_to
        if not few or not folds:
            return logits.attention(q, *self._keys_values(kept), cu_seqlens, cu_seqlens_k)
        q = fold(q, self.k_proj, self.n_kv_heads)
        out = logits.attention(q, kept, kept, cu_seqlens, cu_seqlens_k)
        return unfold(out, self.v_proj, self.n_kv_heads)

    def folds(self) -> bool:
        """Whether queries may meet hidden states: both maps are then products with their weights and no more."""
        return is_plain(self.k_proj, self.v_proj)

    def _keys_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (b m n_kv_heads head_dim) of hidden states (b m 1 d_model)."""
        k, v = (p(hidden[:, :, 0]).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        return k, v
