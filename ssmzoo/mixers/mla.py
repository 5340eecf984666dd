"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.cache import FEW, Cache, Logits, PagedSharedCache, SharedCache, append, borders, empty, positions
from ssmzoo.linear import Linear, is_plain
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._heads import heads_of_width
from ssmzoo.mixers._rope import halves, rotary_angles, rotate, scaling_of
from ssmzoo.norm import RMSNorm
from ssmzoo.registry import register_mixer


@dataclasses.dataclass
class LatentCache(SharedCache):
    """Each token's latent, normalised, and after it its rotary key: width kv_lora_rank + qk_rope_head_dim."""


@dataclasses.dataclass
class PagedLatentCache(PagedSharedCache):
    """The same in pages."""

    dense_class = LatentCache


@register_mixer("mla")
class MLA(Mixer):
    """Multi-head latent attention: softmax attention whose cache is one small vector a token.

    With the paper's symbols (equations 9 to 19; the norms as in its section 3.1.2)::

        c_kv = RMSNorm(W_dkv x),  k_r = RoPE(W_kr x)              all that the state keeps: d_c + d_r numbers
        c_q = RMSNorm(W_dq x),  [q_c, q_r] = W_uq c_q,  q_r ← RoPE(q_r)    for each head
        k_c = W_uk c_kv,  v = W_uv c_kv                                    for each head
        out = softmax((q_c·k_c + q_r·k_r) / √(d_h + d_r)) v

    A whole sequence expands k_c and v. A few new tokens on a filled cache use that q_c·(W_uk c_kv) = (W_ukᵀ q_c)·c_kv
    and Σ p W_uv c_kv = W_uv Σ p c_kv: attention of all heads over the latents themselves, which takes fewer
    operations up to about :attr:`absorbs_up_to` new tokens.

    Args:
        d_model: width of input and output.
        n_heads: heads; d_model / v_head_dim of them if None.
        q_lora_rank: width of the queries' latent c_q; None for a plain projection of x.
        kv_lora_rank: width d_c of the latent c_kv; the smaller of 4 · v_head_dim, as the paper chooses it, and
            d_model / 2 if None.
        qk_nope_head_dim: width d_h of each head's queries and keys that know no position.
        qk_rope_head_dim: width d_r of each head's rotary queries, and of the rotary key that all heads share.
        v_head_dim: width of each head's values.
        rope: rotary positions; without them the shared key and its queries stay as they are, as in Kimi-Linear.
        rope_base: base of the rotary embedding.
        rope_interleave: pairs of the rotary channels are (2i, 2i + 1), as in published weights; otherwise i and
            i + qk_rope_head_dim / 2.
        rope_scaling: ``{"rope_type": "linear", "factor": …}``, or of another type of
            :func:`ssmzoo.mixers._rope.scaling_of`, with its fields.
        norm_eps: of the norms of both latents.
        bias: biases on the projections down to the latents.
        out_bias: a bias on the output projection.
        page_size: the state keeps its tokens in pages of so many, which clones and selections share until one of them
            writes there; None for one stretch of memory, which is copied whole.

    Its state is a :class:`LatentCache`, with ``page_size`` a :class:`PagedLatentCache`.

    Raises:
        ValueError: sizes or scaling that do not fit.
        TypeError: a key of ``rope_scaling`` that does not exist, or a value of the wrong type.
    """

    crosses_in_ops = True
    state_class: type[LatentCache | PagedLatentCache] = LatentCache

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        q_lora_rank: int | None = None,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int = 64,
        qk_rope_head_dim: int = 32,
        v_head_dim: int = 64,
        rope: bool = True,
        rope_base: float = 10000.0,
        rope_interleave: bool = True,
        rope_scaling: dict[str, Any] | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
        out_bias: bool = False,
        page_size: int | None = None,
    ):
        super().__init__(d_model)
        self.check_at_least(
            1,
            n_heads=n_heads,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            v_head_dim=v_head_dim,
            page_size=page_size,
        )
        if qk_rope_head_dim < 2 or qk_rope_head_dim % 2:
            raise ValueError(f"MLA: `qk_rope_head_dim` must be even and at least 2; got {qk_rope_head_dim}")
        if rope_scaling is not None and not rope:
            raise ValueError(f"MLA: `rope_scaling` has no meaning with `rope` false; got {rope_scaling}")
        if rope_base <= 1:
            raise ValueError(f"MLA: `rope_base` must be above 1; got {rope_base}")
        if norm_eps < 0:
            raise ValueError(f"MLA: `norm_eps` must not be negative; got {norm_eps}")
        n_heads = heads_of_width("MLA", d_model, v_head_dim, n_heads, "v_head_dim")
        if kv_lora_rank is None:
            kv_lora_rank = max(1, min(4 * v_head_dim, d_model // 2))

        self.state_class = LatentCache if page_size is None else PagedLatentCache
        self.page_size = page_size
        self.n_heads, self.kv_lora_rank = n_heads, kv_lora_rank
        self.nope, self.rope, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.rotates = rope
        self.rope_base, self.rope_interleave = rope_base, rope_interleave
        self.scaling = scaling_of(rope_scaling, self.rope if rope else None)
        tempered = 1.0 if self.scaling is None else self.scaling.logit_factor
        self.logits = Logits(tempered / math.sqrt(self.nope + self.rope))

        if q_lora_rank is not None:
            self.q_a_proj = Linear(d_model, q_lora_rank, bias=bias)
            self.q_a_norm = RMSNorm(q_lora_rank, norm_eps)
            self.q_b_proj = Linear(q_lora_rank, n_heads * (self.nope + self.rope), bias=False)
        else:
            self.q_proj = Linear(d_model, n_heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj = Linear(d_model, kv_lora_rank + self.rope, bias=bias)
        self.kv_a_norm = RMSNorm(kv_lora_rank, norm_eps)
        self.kv_b_proj = Linear(kv_lora_rank, n_heads * (self.nope + v_head_dim), bias=False)
        self.out_proj = Linear(n_heads * v_head_dim, d_model, bias=out_bias)
        self.q_lora_rank = q_lora_rank

    @property
    def absorbs_up_to(self) -> float:
        """New tokens of a sequence up to which attention over its cached latents takes fewer operations.

        Over m tokens and for each head, expanding them takes 2 m d_c (d_h + d_v) operations, and each query then
        2 m (2 d_c - d_h - d_v) less than over the latents.
        """
        wider = 2 * self.kv_lora_rank - self.nope - self.v_head_dim
        return self.kv_lora_rank * (self.nope + self.v_head_dim) / wider if wider > 0 else float("inf")

    def initial_state(self, batch_size: int, max_length: int | None = None) -> Cache:
        shape = (batch_size, 1, self.kv_lora_rank + self.rope, 0)
        return empty(self.state_class, self.like(), shape, max_length or 0, None, self.page_size)

    def crosses_by(self, with_state: bool) -> Literal["ops", "state", "whole"]:
        """As every mixer's, but that a cache is handed on."""
        return "state" if with_state else super().crosses_by(with_state)

    def mixing_flops(self, context: int) -> float:
        """2 · n_heads · (d_h + d_r + d_v) for each token seen, in the mean over the context, (context + 1) / 2."""
        return self.n_heads * (self.nope + self.rope + self.v_head_dim) * (max(context, 1) + 1)

    def mix(self, x: Tensor, state: Cache | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Cache | None]:
        packed = borders(x, state, cu_seqlens, FEW if self._absorbs() else 0)
        if packed is not None:
            y, state = self.mix(x.reshape(1, -1, self.d_model), state, packed)
            return y.view_as(x), state
        q, new = self._project(x, positions(x, state, cu_seqlens), cu_seqlens)
        if state is None:
            out = self._expanded(q, new, cu_seqlens)
        else:
            out = self._with_cache(q, new, state, cu_seqlens)
        return self.out_proj(out.flatten(2)), state

    def _project(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q (b l h d_h+d_r), and what is kept of each token (b l 1 d_c+d_r); of one dtype."""
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q_c, q_r = q.unflatten(-1, (self.n_heads, -1)).split([self.nope, self.rope], dim=-1)
        c_kv, k_r = self.kv_a_proj(x)[:, :, None].split([self.kv_lora_rank, self.rope], dim=-1)
        if self.rotates:
            if self.rope_interleave:
                q_r, k_r = halves(q_r), halves(k_r)
            turn = (self.rope, self.rope_base, precision(x), self.scaling, cu_seqlens)
            cos, sin = rotary_angles(positions, *turn)
            q_r, k_r = rotate(q_r, cos, sin), rotate(k_r, cos, sin)
        kept = torch.cat([self.kv_a_norm(c_kv).to(q.dtype), k_r], dim=-1)
        return torch.cat([q_c, q_r], dim=-1), kept

    def _with_cache(self, q: Tensor, new: Tensor, cache: Cache, cu_seqlens: Tensor | None) -> Tensor:
        """The next tokens of each sequence, over themselves and what the cache holds; unpacked on the device alone."""
        l, first = q.shape[1], cache.longest == 0
        append(cache, new, new[..., :0], cu_seqlens, q)
        if first:
            return self._expanded(q, new, cu_seqlens)
        absorbs = self._absorbs()
        if absorbs and cu_seqlens is None and l <= FEW:
            return self._unabsorbed(cache.decode(self._absorbed(q), self.logits))
        if cu_seqlens is not None:
            kept, _, cu_seqlens_k = cache.packed(cu_seqlens.diff() > 0)
            few = l <= self.absorbs_up_to * cache.n_sequences
        else:
            kept, cu_seqlens_k = cache.recent(l, -1)[0], None
            few = l <= self.absorbs_up_to
        if not few or not absorbs:
            return self._expanded(q, kept, cu_seqlens, cu_seqlens_k)
        q = self._absorbed(q)
        kept = kept.to(q.dtype)
        out = self.logits.attention(q, kept, kept, cu_seqlens, cu_seqlens_k)
        return self._unabsorbed(out)

    def _expanded(
        self, q: Tensor, kept: Tensor, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None
    ) -> Tensor:
        """Each head with keys and values of its own: (b l h d_v)."""
        c_kv, k_r = kept.split([self.kv_lora_rank, self.rope], dim=-1)
        kv = self.kv_b_proj(c_kv[:, :, 0]).unflatten(-1, (self.n_heads, -1))
        k_c, v = kv.split([self.nope, self.v_head_dim], dim=-1)
        k = torch.cat([k_c, k_r.to(k_c.dtype).expand(-1, -1, self.n_heads, -1)], dim=-1)
        # PyTorch's fused kernels want keys and values of one width; without them it writes all logits to memory.
        width = max(k.shape[-1], self.v_head_dim)
        q, k, v = (_widened(t, width) for t in (q.to(v.dtype), k, v))
        out = self.logits.attention(q, k, v, cu_seqlens, cu_seqlens_k)
        return out[..., : self.v_head_dim]

    def _absorbs(self) -> bool:
        """Whether queries may meet the latents: ``kv_b_proj`` is then a product with its weight and no more."""
        return is_plain(self.kv_b_proj) and self.kv_b_proj.bias is None

    def _absorbed(self, q: Tensor) -> Tensor:
        """Queries that meet the latents themselves: (b l h d_c+d_r)."""
        q_c, q_r = q.split([self.nope, self.rope], dim=-1)
        q_c = torch.einsum("blhn,hnc->blhc", q_c, self._up_projections[0])
        return torch.cat([q_c, q_r.to(q_c.dtype)], dim=-1)

    def _unabsorbed(self, out: Tensor) -> Tensor:
        """Of means of what is kept (b l h d_c+d_r) each head's own values: (b l h d_v)."""
        # The rotary keys rode along: keys and values are one tensor, of one width, read in place.
        return torch.einsum("blhc,hvc->blhv", out[..., : self.kv_lora_rank], self._up_projections[1])

    @property
    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_uk (h d_h d_c) and W_uv (h d_v d_c)."""
        up = self.kv_b_proj.weight.view(self.n_heads, self.nope + self.v_head_dim, self.kv_lora_rank)
        w_uk, w_uv = up.split([self.nope, self.v_head_dim], dim=1)
        return w_uk, w_uv


def _widened(x: Tensor, width: int) -> Tensor:
    """Zeros after the last channel, up to ``width`` of them: they change no product."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
