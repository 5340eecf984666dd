"""The linear attention of Based (Arora et al. 2024, arXiv 2402.18668, section 4; Zoology, 2312.04927).

Glossary: b batch, l length, h: n_heads, d: feature_dim, p: head_dim. For x (b l d_model)::

    q_t, k_t, v_t = q_proj(x_t), k_proj(x_t), v_proj(x_t)      (b l h d), likewise, (b l h p)
    φ(q)·φ(k) = 1 + s + s²/2,   s = q·k / √d                   exp(s) to second order, which is positive
    S_t = S_{t-1} + φ(k_t) [v_t, 1]ᵀ                           (b h f p+1), the state; f = 1 + d + d (d + 1) / 2
    [y_t, z_t] = S_tᵀ φ(q_t)                                   (b l h p), (b l h)
    out = o_proj(y / (z + ε))                                  (b l d_model)

φ(x) holds 1, x, the squares and the products of pairs; each pair once, where the published code holds it twice. Based
itself has such layers between layers of attention with a short window: ``attention`` with ``window=64`` in the pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._linear_attention import LinearAttentionState, attend
from ssmzoo.registry import register_mixer


def taylor_features(x: Tensor) -> Tensor:
    """x (… d) → φ(x) (… f), such that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k / √d."""
    d = x.shape[-1]
    i, j = torch.triu_indices(d, d, device=x.device)
    weight = (1 - (1 - 0.5**0.5) * (i == j).to(x.dtype)) * d**-0.5  # a pair stands for two equal products
    return torch.cat([torch.ones_like(x[..., :1]), x * d**-0.25, x[..., i] * x[..., j] * weight], dim=-1)


@register_mixer("based")
class Based(Mixer):
    """Linear attention whose features are the exponential's Taylor series to second order.

    Args:
        d_model: width of input and output.
        feature_dim: d, channels of a head's queries and keys before the features.
        n_heads: h.
        n_kv_heads: heads of keys and values, each for several queries; n_heads if None.
        eps: ε, added to the sum of weights.

    The names of its weights are those of flash-linear-attention.
    """

    crosses_in_ops = True
    state_class = LinearAttentionState
    residual_projections = ("o_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        feature_dim: int = 16,
        n_heads: int = 12,
        n_kv_heads: int | None = None,
        eps: float = 1e-12,
    ):
        super().__init__(d_model)
        groups = n_heads if n_kv_heads is None else n_kv_heads
        self.check_at_least(1, feature_dim=feature_dim, n_heads=n_heads, n_kv_heads=groups)
        self.check_at_least(0, eps=eps)
        if d_model % n_heads or n_heads % groups:
            raise ValueError(
                f"Based: `n_heads` must divide d_model, and `n_kv_heads` n_heads; got n_heads={n_heads}, "
                f"n_kv_heads={groups} and d_model={d_model}"
            )
        self.feature_dim, self.n_heads, self.n_kv_heads, self.eps = feature_dim, n_heads, groups, eps
        self.head_dim = d_model // n_heads
        self.n_features = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        self.q_proj = Linear(d_model, n_heads * feature_dim, bias=False)
        self.k_proj = Linear(d_model, groups * feature_dim, bias=False)
        self.v_proj = Linear(d_model, groups * self.head_dim, bias=False)
        self.o_proj = Linear(d_model, d_model, bias=False)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> LinearAttentionState:
        new = self.like(wide=True).new_zeros
        return LinearAttentionState(S=new(batch_size, self.n_heads, self.n_features, self.head_dim + 1))

    def mixing_flops(self, context: int) -> float:
        """Four for each number of the state, which does not decay."""
        return 4 * self.n_heads * self.n_features * (self.head_dim + 1)

    def mix(
        self, x: Tensor, state: LinearAttentionState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        q, k = (p(x).unflatten(-1, (-1, self.feature_dim)) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        # Weights and their sum differ by far less than they are: half precision would not tell them apart
        q, k, v = (t.to(precision(t)) for t in (q, k, v))
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2) for t in (k, v))
        S = None if state is None else state.S
        y, S = attend(taylor_features(q), taylor_features(k), v, None, S, cu_seqlens, scale=1.0)
        y = (y[..., :-1] / (y[..., -1:] + self.eps)).to(x.dtype)
        return self.o_proj(y.flatten(2)), None if state is None else LinearAttentionState(S)
