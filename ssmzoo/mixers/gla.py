"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635, section 4).

Glossary: b batch, l length, h: n_heads, k and v channels of a head's keys and values. For x (b l d_model)::

    q_t, k_t, v_t = q_proj(x_t), k_proj(x_t), v_proj(x_t)         (b l h k), likewise, (b l h v)
    α_t = σ(gk_proj(x_t))^(1/16)                                  (b l h k), the decay; gk_proj has rank 16
    S_t = diag(α_t) S_{t-1} + k_t v_tᵀ                            (b h k v), the state
    o_t = S_tᵀ q_t / √k                                           (b l h v)
    out = o_proj(rms(o) · silu(g_proj(x)))                        (b l d_model), a norm for each head
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls
from ssmzoo.linear import Linear, prepare_maps
from ssmzoo.mixers._linear_attention import LinearAttention, LinearAttentionOptions, LinearAttentionState, xavier
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class GLAOptions(LinearAttentionOptions):
    """Options of gated linear attention, beside those of :class:`LinearAttentionOptions`.

    Attributes:
        gate_logit_normalizer: the logarithm of σ is divided by it: 1/16 is the power above.
        gate_low_rank_dim: rank of the decay's projection.
        clamp_min: the least that the logarithm of a decay may be.
    """

    expand_k: float = 0.5
    expand_v: float = 1.0
    n_heads: int = 4
    gate_logit_normalizer: int = 16
    gate_low_rank_dim: int = 16
    clamp_min: float | None = None


@register_mixer("gla")
class GLA(LinearAttention):
    """Gated linear attention: a matrix state whose rows decay by gates of low rank.

    The names of its weights are those of flash-linear-attention.
    """

    options_class = GLAOptions

    def __init__(self, d_model: int, **options: Any):
        o = GLAOptions(**options)
        super().__init__(d_model, o)
        self.check_at_least(1, gate_logit_normalizer=o.gate_logit_normalizer, gate_low_rank_dim=o.gate_low_rank_dim)
        if o.clamp_min is not None and not o.clamp_min <= 0:
            raise ValueError(f"GLA: `clamp_min` must be at most 0, as logarithms of decays are; got {o.clamp_min}")
        self.normalizer, self.clamp_min = o.gate_logit_normalizer, o.clamp_min
        self.gk_proj = nn.Sequential(
            Linear(d_model, o.gate_low_rank_dim, bias=False), Linear(o.gate_low_rank_dim, self.widths[1])
        )
        xavier(*(module for module in self.children() if isinstance(module, Linear | nn.Sequential)))

    def log_decay(self, x: Tensor) -> Tensor:
        """(b l h k), in float32 (float64)."""
        logits = self.gk_proj(x).unflatten(-1, (self.n_kv_heads, self.k_dim))
        log = F.logsigmoid(logits.to(precision(logits))) / self.normalizer
        return self.spread(log if self.clamp_min is None else log.clamp(min=self.clamp_min))

    def prepare_step(self, calls: Calls, x: Tensor, state: LinearAttentionState) -> Tensor | None:
        def log_decay() -> Tensor:
            logits = prepare_maps(calls, self.gk_proj, x)
            least = -math.inf if self.clamp_min is None else self.clamp_min * self.normalizer
            log = calls.activated(logits, "log_sigmoid", least=least, scale=1 / self.normalizer)
            return log.unflatten(-1, (self.n_heads, self.k_dim))

        return self.prepare_recall(calls, x, state, log_decay)
