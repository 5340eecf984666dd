"""Softmax attention as a mixer (Vaswani et al. 2017, arXiv 1706.03762), with language models' options."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels import attention, decode_attention
from ssmkernels.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixers._base import Mixer
from ssmzoo.mixers._kv_cache import KVCache, owners
from ssmzoo.mixers._rope import rotary_angles, rotate
from ssmzoo.norm import RMSNorm
from ssmzoo.registry import register_mixer

FEW = 8  # new tokens up to which a call on a filled cache counts as decoding


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
    def bounds(self) -> tuple[int, int] | None:
        """The window as the op takes it: tokens seen before and after a token's own."""
        if self.window is None:
            return None
        return self.window - 1, 0 if self.causal else self.window - 1

    def initial_state(self, batch_size: int, max_length: int | None = None) -> KVCache:
        if not self.causal:
            raise ValueError("Attention: with `bidirectional` it has no state, as it sees the whole sequence at once")
        keep = None if self.window is None else self.window - 1
        shape = (batch_size, self.n_kv_heads, self.head_dim)
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
        b, l, _ = x.shape
        if state is not None and not state.even and cu_seqlens is None and l > FEW:
            cu_seqlens = torch.arange(0, b * l + 1, l, dtype=torch.int32, device=x.device)
            y, state = self.mix(x.reshape(1, b * l, -1), state, cu_seqlens)
            return y.view(b, l, -1), state
        q, k, v = self._project(x, _positions(x, state, cu_seqlens))
        if state is None:
            out = self._attention(q, k, v, cu_seqlens)
        else:
            if cu_seqlens is None:
                out = self._with_cache(q, k, v, state)
            else:
                out = self._packed_with_cache(q, k, v, state, cu_seqlens)
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

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:
        out = attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.bounds,
            softcap=self.softcap,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
        )
        assert isinstance(out, Tensor)
        return out

    def _with_cache(self, q: Tensor, k: Tensor, v: Tensor, state: KVCache) -> Tensor:
        """The next l tokens of each sequence; on the device alone."""
        l, before = q.shape[1], state.longest
        state.append(k, v, _differentiable(q, k, v))
        if before == 0:
            return self._attention(q, k, v)
        # Where all sequences are equally long, keys before every window need not be read.
        start = max(0, before + 1 - self.window) if self.window is not None and state.even else 0
        keys, values = state.keys[:, start : state.longest], state.values[:, start : state.longest]
        if l > FEW:
            return self._attention(q, keys, values)
        out = decode_attention(q, keys, values, state.held - start, window=self.bounds, softcap=self.softcap)
        assert isinstance(out, Tensor)
        return out

    def _packed_with_cache(self, q: Tensor, k: Tensor, v: Tensor, state: KVCache, cu_seqlens: Tensor) -> Tensor:
        """Of each sequence its own number of next tokens, possibly none."""
        before = state.longest
        state.append_packed(k, v, cu_seqlens, _differentiable(q, k, v))
        if before == 0:
            return self._attention(q, k, v, cu_seqlens)
        keys, values, cu_seqlens_k = state.packed(cu_seqlens.diff() > 0)
        return self._attention(q, keys, values, cu_seqlens, cu_seqlens_k)


def _positions(x: Tensor, state: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
    """Where in its sequence each token stands: (b l), or (1 l) where that is the same for all."""
    l = x.shape[1]
    if cu_seqlens is None:
        steps = torch.arange(l, device=x.device)
        return steps[None] if state is None else state.lengths[:, None] + steps
    positions = owners(cu_seqlens, l)[1] if state is None else state.places(cu_seqlens, l)[1]
    return positions[None]


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
