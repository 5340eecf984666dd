"""Softmax attention as a mixer (Vaswani et al. 2017, arXiv 1706.03762), with language models' options."""

from __future__ import annotations

import math

from torch import Tensor

from ssmkernels.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixers._base import Mixer
from ssmzoo.mixers._cached import FEW, append, borders, positions
from ssmzoo.mixers._kv_cache import KVCache
from ssmzoo.mixers._logits import Logits
from ssmzoo.mixers._rope import rotary_angles, rotate
from ssmzoo.norm import RMSNorm
from ssmzoo.registry import register_mixer


@register_mixer("attention")
class Attention(Mixer):
    """Softmax attention: each token takes a weighted mean of the values of the tokens it sees.

    Args:
        d_model: width of input and output.
        head_dim: width of each head.
        n_heads: heads of the queries; d_model / head_dim of them if None.
        n_kv_heads: heads of keys and values (grouped queries, arXiv 2305.13245); as many as n_heads if None.
        rope: rotary position embedding (arXiv 2104.09864), in the rotate-half form.
        rope_base: its base.
        rope_dim: leading channels of each head that it turns; all if None.
        window: how many tokens a token sees, itself included; with ``bidirectional`` that many on each
            side. All if None.
        qk_norm: RMSNorm with weights over each head's queries and keys, before the rotary embedding.
        bias: biases on the query, key and value projections.
        out_bias: a bias on the output projection.
        softcap: bounds the logits smoothly to ± softcap (arXiv 2408.00118); 0 for none.
        bidirectional: every token sees later ones too; there is then no state.

    Its state is a :class:`~ssmzoo.mixers._kv_cache.KVCache`. With a window it keeps what can still be seen, and
    about as much again, however many tokens come.

    Raises:
        ValueError: sizes that do not fit together.
    """

    state_class = KVCache

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int = 64,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        rope_dim: int | None = None,
        window: int | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        out_bias: bool = False,
        softcap: float = 0.0,
        bidirectional: bool = False,
    ):
        super().__init__(d_model)
        for name, size in (
            ("head_dim", head_dim),
            ("n_heads", n_heads),
            ("n_kv_heads", n_kv_heads),
            ("rope_base", rope_base),
            ("window", window),
        ):
            if size is not None and size < 1:
                raise ValueError(f"Attention: `{name}` must be at least 1; got {size}")
        if n_heads is None:
            if d_model % head_dim:
                raise ValueError(
                    f"Attention: `head_dim` must divide d_model, or `n_heads` be given; got "
                    f"head_dim={head_dim} and d_model={d_model}"
                )
            n_heads = d_model // head_dim
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads % n_kv_heads:
            raise ValueError(
                f"Attention: `n_kv_heads` must divide the number of heads, {n_heads} (d_model={d_model}, "
                f"head_dim={head_dim}); got {n_kv_heads}"
            )
        if rope:
            rope_dim = head_dim if rope_dim is None else rope_dim
            if rope_dim % 2 or not 2 <= rope_dim <= head_dim:
                raise ValueError(
                    f"Attention: `rope_dim` must be even and at most head_dim={head_dim}, or `rope` false; "
                    f"got {rope_dim}"
                )
        elif rope_dim is not None:
            raise ValueError(f"Attention: `rope_dim` has no meaning with `rope` false; got {rope_dim}")
        if softcap < 0:
            raise ValueError(f"Attention: `softcap` must be positive, or 0 for none; got {softcap}")

        self.head_dim, self.n_heads, self.n_kv_heads = head_dim, n_heads, n_kv_heads
        self.rope_dim, self.rope_base = rope_dim, rope_base
        self.window, self.softcap = window, softcap
        self.causal = not bidirectional
        self.q_proj = Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.out_proj = Linear(n_heads * head_dim, d_model, bias=out_bias)
        self.q_norm = RMSNorm(head_dim) if qk_norm else None
        self.k_norm = RMSNorm(head_dim) if qk_norm else None

    @property
    def logits(self) -> Logits:
        """What the ops are told beside queries, keys and values."""
        window = None if self.window is None else (self.window - 1, 0 if self.causal else self.window - 1)
        return Logits(1 / math.sqrt(self.head_dim), self.causal, window, self.softcap)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> KVCache:
        if not self.causal:
            raise ValueError("Attention: with `bidirectional` it has no state, as it sees the whole sequence at once")
        keep = None if self.window is None else self.window - 1
        shape = (batch_size, self.n_kv_heads, self.head_dim, self.head_dim)
        return KVCache.empty(self.k_proj.weight, shape, max_length or 0, keep)

    def mixing_flops(self, context: int) -> float:
        """4 · n_heads · head_dim for each token seen (keys, then values), in the mean over the context.

        Of n tokens with a window of w ≤ n, a token sees (w (w + 1) / 2 + (n - w) w) / n; bidirectional, twice
        that less one.
        """
        n = max(context, 1)
        w = n if self.window is None else min(self.window, n)
        seen = (w * (w + 1) / 2 + (n - w) * w) / n
        return 4 * self.n_heads * self.head_dim * (seen if self.causal else 2 * seen - 1)

    def mix(self, x: Tensor, state: KVCache | None, cu_seqlens: Tensor | None) -> tuple[Tensor, KVCache | None]:
        packed = borders(x, state, cu_seqlens)
        if packed is not None:
            y, state = self.mix(x.reshape(1, -1, self.d_model), state, packed)
            return y.view_as(x), state
        q, k, v = self._project(x, positions(x, state, cu_seqlens))
        if state is None:
            out = self.logits.attention(q, k, v, cu_seqlens)
        else:
            out = self._with_cache(q, k, v, state, cu_seqlens)
            state.trim()
        return self.out_proj(out.flatten(2)), state

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (b l n_heads head_dim), k and v (b l n_kv_heads head_dim) of one dtype."""
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim))
        k, v = (p(x).unflatten(-1, (self.n_kv_heads, self.head_dim)) for p in (self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_dim is not None:
            cos, sin = rotary_angles(positions, self.rope_dim, self.rope_base, precision(x))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.to(v.dtype), k.to(v.dtype), v  # under autocast norms give float32

    def _with_cache(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, cu_seqlens: Tensor | None) -> Tensor:
        """The next tokens of each sequence, over themselves and what the cache holds; unpacked on the device alone."""
        l, logits = q.shape[1], self.logits
        first = cache.longest == 0
        append(cache, k, v, cu_seqlens, q)
        if first:
            return logits.attention(q, k, v, cu_seqlens)
        if cu_seqlens is not None:
            keys, values, cu_seqlens_k = cache.packed(cu_seqlens.diff() > 0)
            return logits.attention(q, keys, values, cu_seqlens, cu_seqlens_k)
        if l <= FEW:
            return cache.decode(q, logits)
        keys, values, _ = cache.recent(l, -1 if self.window is None else self.window - 1)
        return logits.attention(q, keys, values)
