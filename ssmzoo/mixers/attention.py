"""Softmax attention as a mixer (Vaswani et al. 2017, arXiv 1706.03762), with language models' options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls
from ssmzoo.cache import FEW, Cache, KVCache, Logits, PagedCache, append, borders, empty, newest, positions
from ssmzoo.cache.hidden import HiddenCache, PagedHiddenCache
from ssmzoo.linear import Linear
from ssmzoo.mixers._alibi import alibi_slopes
from ssmzoo.mixers._attention_options import check_hidden, heads, norms_of, rotary_dim
from ssmzoo.mixers._attention_token import prepare_token
from ssmzoo.mixers._convolution import convolve
from ssmzoo.mixers._hidden_attention import HiddenAttention
from ssmzoo.mixers._rope import rotary_angles, rotate, scaling_of
from ssmzoo.mixers._unit_values import matrix_of, unit_values
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class ConvolvedState(State):
    """A cache, and what the convolution before it remembers."""

    conv: Tensor  # (s, d_conv - 1, (n_heads + 2 n_kv_heads) head_dim), the last inputs; float32
    cache: Cache


@register_mixer("attention")
class Attention(HiddenAttention):
    """Softmax attention: each token takes a weighted mean of the values of the tokens it sees.

    Args:
        d_model: width of input and output.
        head_dim: width of each head.
        n_heads: heads of the queries; d_model / head_dim of them if None.
        n_kv_heads: heads of keys and values (grouped queries, arXiv 2305.13245); as many as n_heads if None.
        rope: rotary position embedding (arXiv 2104.09864), in the rotate-half form.
        rope_base: its base.
        rope_dim: leading channels of each head that it turns; all if None.
        rope_scaling: ``{"rope_type": "linear", "factor": …}``, or of another type of
            :func:`ssmzoo.mixers._rope.scaling_of`, with its fields. As in transformers, YaRN's temperature is in the
            cosines and sines alone.
        window: how many tokens a token sees, itself included; with ``bidirectional`` that many on each
            side. All if None.
        qk_norm: RMSNorm with weights over each head's queries and keys, before the rotary embedding; ``"centred"``
            with weights 1 + w, as in Qwen3-Next; ``"whole"`` over all heads' channels together, as in OLMo 2 (arXiv
            2501.00656).
        qk_norm_eps: added to its mean of squares.
        bias: biases on the projections to queries, keys and values, and to the gate.
        out_bias: a bias on the output projection.
        scale: of the products of queries and keys; 1/√head_dim if None.
        softcap: bounds the logits smoothly to ± softcap (arXiv 2408.00118); 0 for none.
        sinks: one more logit per head, learned, that takes weight and has no value, as in gpt-oss (arXiv 2508.10925);
            it starts normal with deviation 0.02.
        alibi: each head's logits fall linearly with distance, at fixed slopes (ALiBi, arXiv 2108.12409). In place of
            ``rope``, which must be false.
        gate: multiplies the heads' outputs, before the output projection, by the sigmoid of a linear map of x: one
            gate for each channel of each head, ``"elementwise"``, or for each head, ``"headwise"`` (variant G1 of gated
            attention, arXiv 2505.06708). None for none.
        d_conv: width of a causal depthwise convolution over time, with a bias and no activation, of queries, keys and
            values, between the projections and all else, as in the published mamba2attn (arXiv 2405.21060); 0 for
            none. It looks back only, with ``bidirectional`` too.
        cache: what the state keeps of each token: ``"kv"``, keys and values, 2 · n_kv_heads · head_dim numbers; or
            ``"hidden"``, the mixer's input, d_model numbers, with the same outputs (EL-attention, arXiv 2105.04779).
            A few new tokens then fold the key projection into their queries and the value projection into their
            outputs; more make keys and values of all, beyond :attr:`folds_up_to`. That excludes what comes
            between projection and product, ``rope``, ``qk_norm`` and ``d_conv``; and where a key's bias does not
            cancel, ``bias`` with ``sinks`` or ``softcap``.
        page_size: the state keeps its tokens in pages of so many (PagedAttention, arXiv 2309.06180), which clones and
            selections share until one of them writes there: for beams, and for many continuations of one prompt. Each
            sequence leaves less than a page unused. None for one stretch of memory, as long as the longest sequence
            needs, which is copied whole.
        bidirectional: every token sees later ones too; there is then no state.

    Its state is a :class:`~ssmzoo.cache.kv.KVCache`, a :class:`~ssmzoo.cache.hidden.HiddenCache`, with
    ``page_size`` a :class:`~ssmzoo.cache.paged.PagedCache` of either kind, and with ``d_conv`` a
    :class:`ConvolvedState` of one of these. With a window it keeps what can still be seen, and about as much again,
    however many tokens come.

    Raises:
        ValueError: sizes or options that do not fit together.
        TypeError: a key of ``rope_scaling`` that does not exist, or a value of the wrong type.
    """

    crosses_in_ops = True
    state_class: type[State] = KVCache

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
        rope_scaling: dict[str, Any] | None = None,
        window: int | None = None,
        qk_norm: bool | Literal["centred", "whole"] = False,
        qk_norm_eps: float = 1e-5,
        bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
        alibi: bool = False,
        gate: Literal["elementwise", "headwise"] | None = None,
        d_conv: int = 0,
        cache: Literal["kv", "hidden"] = "kv",
        page_size: int | None = None,
        bidirectional: bool = False,
    ):
        super().__init__(d_model)
        self.look_ahead(bidirectional)
        self.check_at_least(
            1, head_dim=head_dim, n_heads=n_heads, n_kv_heads=n_kv_heads, window=window, page_size=page_size
        )
        n_heads, n_kv_heads = heads(d_model, head_dim, n_heads, n_kv_heads)
        self.rope_dim = rotary_dim(rope, rope_dim, rope_base, rope_scaling, head_dim)
        if softcap < 0:
            raise ValueError(f"Attention: `softcap` must be positive, or 0 for none; got {softcap}")
        if alibi and rope:
            raise ValueError("Attention: `alibi` takes the place of the rotary embedding; give rope=False with it")
        if d_conv < 0:
            raise ValueError(f"Attention: `d_conv` must be at least 1, or 0 for no convolution; got {d_conv}")
        if page_size is not None and bidirectional:
            raise ValueError("Attention: `page_size` has no meaning with `bidirectional`: there is then no state")
        self.cache_class: type[Cache] = KVCache if page_size is None else PagedCache
        if cache == "hidden":
            self.cache_class = HiddenCache if page_size is None else PagedHiddenCache
            check_hidden(
                rope=rope,
                qk_norm=bool(qk_norm),
                d_conv=d_conv,
                bidirectional=bidirectional,
                bias=bias,
                sinks=sinks,
                softcap=softcap,
            )

        self.head_dim, self.n_heads, self.n_kv_heads = head_dim, n_heads, n_kv_heads
        self.rope_base, self.scaling = rope_base, scaling_of(rope_scaling, self.rope_dim)
        self.window, self.softcap, self.alibi = window, softcap, alibi
        self.scale = scale
        self.d_conv, self.cache, self.page_size = d_conv, cache, page_size
        self.q_proj = Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.out_proj = Linear(n_heads * head_dim, d_model, bias=out_bias)
        self.qk_norm = qk_norm
        self.q_norm, self.k_norm = norms_of(qk_norm, head_dim, (n_heads, n_kv_heads), qk_norm_eps)
        self.gate_proj = None
        if gate is not None:
            self.gate_proj = Linear(d_model, n_heads * (head_dim if gate == "elementwise" else 1), bias=bias)
        self.conv1d, self.state_class = None, self.cache_class
        if d_conv:
            # Holds the weight and bias under their published names; the op does the convolution.
            self.conv1d = nn.Conv1d(self.qkv_dim, self.qkv_dim, d_conv, groups=self.qkv_dim)
            self.state_class = ConvolvedState
        self.sinks = nn.Parameter(0.02 * torch.randn(n_heads)) if sinks else None

    @property
    def qkv_dim(self) -> int:
        """Channels of queries, keys and values together."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    @property
    def logits(self) -> Logits:
        """What the ops are told beside queries, keys and values."""
        window = None if self.window is None else (self.window - 1, 0 if self.causal else self.window - 1)
        slopes = alibi_slopes(self.n_heads, self.like()) if self.alibi else None
        scale = 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale
        return Logits(scale, self.causal, window, self.softcap, slopes, self.sinks)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> Cache | ConvolvedState:
        self.check_has_state()
        keep = None if self.window is None else self.window - 1
        shape = (self.n_kv_heads, self.head_dim, self.head_dim) if self.cache == "kv" else (1, self.d_model, 0)
        like = self.like()
        cache = empty(self.cache_class, like, (batch_size, *shape), max_length or 0, keep, self.page_size)
        if self.conv1d is None:
            return cache
        conv = like.new_zeros(batch_size, self.d_conv - 1, self.qkv_dim, dtype=precision(like))
        return ConvolvedState(conv, cache)

    def crosses_by(self, with_state: bool) -> Literal["ops", "state", "whole"]:
        """As every mixer's, but that a cache of hidden states is handed on."""
        return "state" if with_state and self.cache == "hidden" else super().crosses_by(with_state)

    def mixing_flops(self, context: int) -> float:
        """4 · n_heads · head_dim for each token seen (keys, then values), in the mean over the context.

        Of n tokens with a window of w ≤ n, a token sees (w (w + 1) / 2 + (n - w) w) / n; bidirectional, twice
        that less one. The convolution takes two a tap and channel.
        """
        n = max(context, 1)
        w = n if self.window is None else min(self.window, n)
        seen = (w * (w + 1) / 2 + (n - w) * w) / n
        seen = seen if self.causal else 2 * seen - 1
        return 4 * self.n_heads * self.head_dim * seen + 2 * self.d_conv * self.qkv_dim

    def mix(
        self, x: Tensor, state: Cache | ConvolvedState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Cache | ConvolvedState | None]:
        conv, cache = (state.conv, state.cache) if isinstance(state, ConvolvedState) else (None, state)
        packed = borders(x, cache, cu_seqlens, FEW if self.cache == "kv" or self.folds() else 0)
        if packed is not None:
            y, state = self.mix(x.reshape(1, -1, self.d_model), state, packed)
            return y.view_as(x), state
        if cache is not None and self.cache == "hidden":
            out = self.over_hidden(x, cache, cu_seqlens, self.logits)
        else:
            q, k, v, conv = self._project(x, positions(x, cache, cu_seqlens), conv, cu_seqlens)
            if cache is None:
                out = self.logits.attention(q, k, v, cu_seqlens)
            else:
                out = self._over_keys(q, k, v, cache, cu_seqlens)
        if cache is not None:
            cache.trim()
        if self.gate_proj is not None:
            out = out * self.gate_proj(x).sigmoid().unflatten(-1, (self.n_heads, -1))
        if isinstance(state, ConvolvedState) and conv is not None and cache is not None:
            state = ConvolvedState(conv, cache)
        return self.out_proj(out.flatten(2)), state

    def prepare_step(self, calls: Calls, x: Tensor, state: Cache | ConvolvedState) -> Tensor | None:
        if isinstance(state, ConvolvedState) or state.layout is None:
            return None
        return prepare_token(self, calls, x, state)

    def matrix(self, x: Tensor) -> Tensor:
        q, k, _, _ = self._project(x, positions(x, None, None), None, None)
        return matrix_of(self.logits.attention(q, k, unit_values(k, self.n_kv_heads), None))

    def _project(
        self, x: Tensor, positions: Tensor, conv: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q (b l n_heads head_dim), k and v (b l n_kv_heads head_dim) of one dtype; the convolution's state after."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv1d is not None:
            widths = [q.shape[-1], k.shape[-1], v.shape[-1]]
            qkv, conv = convolve(self.conv1d, torch.cat([q, k, v], dim=-1), self.d_conv, None, conv, cu_seqlens)
            q, k, v = qkv.split(widths, dim=-1)
        if self.q_norm is not None and self.k_norm is not None and self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and self.qk_norm != "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_dim is not None:
            turn = (self.rope_dim, self.rope_base, precision(x), self.scaling, cu_seqlens)
            cos, sin = rotary_angles(positions, *turn)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.to(v.dtype), k.to(v.dtype), v, conv  # under autocast norms give float32

    def _over_keys(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, cu_seqlens: Tensor | None) -> Tensor:
        """The next tokens of each sequence, over themselves and what the cache holds; unpacked on the device alone."""
        first = cache.longest == 0
        append(cache, k, v, cu_seqlens, q)
        if first:
            return self.logits.attention(q, k, v, cu_seqlens)
        return newest(cache, q, self.logits, cu_seqlens)
