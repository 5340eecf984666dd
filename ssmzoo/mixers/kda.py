"""Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692, section 3), the mixer of Kimi-Linear.

Glossary: b batch, l length, h heads of values, g heads of queries and keys, k and v channels of a head. For x
(b l d_model)::

    q, k, v = silu(conv1d(q_proj x)), …                     (b l g k) twice, (b l h v); causal, over d_conv tokens
    q, k    = q / |q|, k / |k|
    β       = σ(b_proj x)                                   (b l h), twice that with allow_neg_eigval
    log α   = -exp(A_log) softplus(f_proj x + dt_bias)      (b l h k); f_proj is of low rank
              or lower_bound · σ(exp(A_log) (f_proj x + dt_bias))
    S_t = (I - β_t k_t k_tᵀ) diag(α_t) S_{t-1} + β_t k_t v_tᵀ  (b h k v), the state
    o_t = S_tᵀ q_t / √k                                     (b l h v)
    out = o_proj(rms(o) · σ(g_proj x))                      (b l d_model), a norm for each head; g_proj is of low rank

Against gated DeltaNet, each key channel forgets at its own rate, as in gated linear attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmkernels import rms_norm
from ssmkernels.core.finite import finite_exp
from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls
from ssmzoo.linear import Linear, is_plain, prepare_maps
from ssmzoo.mixers._delta import DeltaMixer, DeltaState
from ssmzoo.mixers._delta_options import DecayingOptions
from ssmzoo.mixers._gates import sigmoid
from ssmzoo.norm import RMSNorm
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class KDAOptions(DecayingOptions):
    """Options of Kimi Delta Attention, beside those of :class:`DecayingOptions`.

    Attributes:
        gate_lower_bound: a bound below 0 of the log decay, which is a scale of it and no clamp; unbounded if None.
        gate_bias: a bias on the output gate, as flash-linear-attention has it and Kimi-Linear does not.
    """

    n_heads: int = 16
    head_dim: int = 128
    expand_v: float = 1.0
    A_init_range: tuple[float, float] = (1.0, 16.0)
    gate_lower_bound: float | None = None
    gate_bias: bool = True


@register_mixer("kda")
class KDA(DeltaMixer):
    """Kimi Delta Attention: a gated delta rule whose decay is one number for each key channel.

    The options are those of :class:`KDAOptions`; the names of the weights are those of flash-linear-attention, in which
    ``f_proj`` and ``g_proj`` are Kimi-Linear's pairs ``f_a_proj``, ``f_b_proj`` and ``g_a_proj``, ``g_b_proj``.
    ``A_log`` and ``dt_bias`` stay float32.
    """

    options_class = KDAOptions

    def __init__(self, d_model: int, **options: Any):
        o = KDAOptions(**options)
        if o.gate_lower_bound is not None and not o.gate_lower_bound < 0:
            raise ValueError(f"KDA: `gate_lower_bound` must be below 0; got {o.gate_lower_bound}")
        rank = self.value_dim(o)
        super().__init__(d_model, o, head_k_dim=o.head_dim, head_v_dim=rank, n_v_heads=o.n_v_heads)
        self.gate_lower_bound = o.gate_lower_bound
        decays, values = self.n_v_heads * o.head_dim, self.n_v_heads * rank
        self.f_proj = nn.Sequential(Linear(d_model, rank, bias=False), Linear(rank, decays, bias=False))
        self.add_decay(o, decays)
        self.g_proj = nn.Sequential(Linear(d_model, rank, bias=False), Linear(rank, values, bias=o.gate_bias))
        self.o_norm = RMSNorm(rank, o.norm_eps)

    def log_decay(self, x: Tensor) -> Tensor:
        f = self.f_proj(x)
        f = (f.to(precision(f)) + self.dt_bias).unflatten(-1, (self.n_v_heads, self.head_k_dim))
        A = finite_exp(rearrange(self.A_log, "h -> h 1"))
        if self.gate_lower_bound is None:
            return -A * F.softplus(f, threshold=40)
        return self.gate_lower_bound * sigmoid(A * f)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o) * torch.sigmoid(cast(nn.Module, self.g_proj)(x)).view_as(o)

    def prepare_step(self, calls: Calls, x: Tensor, state: DeltaState) -> Tensor | None:
        norm = cast(RMSNorm, self._modules["o_norm"])
        if not is_plain(norm, kinds=(RMSNorm,)):
            return None

        def log_decay() -> Tensor:
            keys = (self.n_v_heads, self.head_k_dim)
            f = prepare_maps(calls, self.f_proj, x).view(-1, self.head_k_dim)  # (b h, k)
            bias, A = self.dt_bias.view(keys), calls.activated(self.A_log[:, None], "finite_exp")
            if self.gate_lower_bound is None:
                log = calls.activated(f, "softplus", bias=bias, scale=-1.0, factor=A)
            else:
                log = calls.activated(calls.activated(f, bias=bias, factor=A), "sigmoid", scale=self.gate_lower_bound)
            return log.unflatten(0, (-1, self.n_v_heads))

        def finish(o: Tensor) -> Tensor:
            normed = calls.op(rms_norm, o, norm.weight, eps=norm.eps).flatten(1)
            return calls.activated(prepare_maps(calls, self.g_proj, x), "sigmoid", factor=normed)

        return self.prepare_recall(calls, x, state, log_decay, finish)
