"""Log-linear Mamba-2 (Guo et al. 2025, arXiv 2506.04761): Mamba-2 whose past lies in a hierarchy of states.

Glossary, beside that of :mod:`ssmzoo.mixers.mamba2`:

    λ (b l h levels): how much a token's output counts what it remembers of each level    L (h levels): learned

One layer, for u (b l d_model)::

    z, x, B, C, δ = as Mamba-2, after its convolution
    Δ   = softplus(δ + dt_bias)                        (b l h)
    λ   = softplus(L ∘ l_proj(u))                      (b l h levels)
    y_t = Σ_{s≤t} λ_t^level(t,s) · exp(A (Δ_{s+1} + … + Δ_t)) · (C_t · B_s) Δ_s x_s + D x_t
    out = out_proj(norm(y · silu(z)))

Level 0 is the token itself, level i the block of 2^(i-1) tokens that the i-th binary digit of t stands for
(:mod:`ssmzoo.mixers._log_linear`). A sequence of T tokens takes T log T operations, and a token that is written log T
states.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.core.finite import finite_exp
from ssmkernels.core.validate import precision
from ssmzoo.init import wide_dtype
from ssmzoo.linear import Linear
from ssmzoo.mixers._convolution import convolve
from ssmzoo.mixers._log_linear import Tokens, recall, recall_further
from ssmzoo.mixers.mamba2 import Mamba2, Mamba2State
from ssmzoo.norm import GatedRMSNorm
from ssmzoo.registry import register_mixer


@dataclasses.dataclass
class LogLinearState(Mamba2State):
    """What the convolution and the hierarchy remember: ``ssm`` are the states of levels 1, 2, …."""

    ssm: Tensor  # (s, n_levels - 1, h, n, p), float32
    position: Tensor  # (s), int64: how many tokens have been read


@register_mixer("log_linear_mamba2")
class LogLinearMamba2(Mamba2):
    """Mamba-2 with log-linear attention: the past in blocks of 1, 2, 4, … tokens, each with a state and a weight.

    Args:
        d_model: width of input and output.
        n_levels: of the hierarchy, the token itself included. The last one takes in all that is further away: with 15,
            the published number, from token 16 384 on.
        d_state, d_conv, expand, headdim, ngroups: as :class:`~ssmzoo.mixers.mamba2.Mamba2`'s.
        dt_min, dt_max, dt_init_floor, dt_limit, A_init_range: likewise.
        norm_eps: added to the mean of squares.
        conv_bias: a bias on the convolution.
        bias: biases on the input and output projections.

    ``L`` starts at 1 and stays float32, as ``A_log``, ``D`` and ``dt_bias`` do. The published layer keeps the rows of
    ``l_proj`` as the last ones of ``in_proj``.
    """

    crosses_in_ops = False  # its states of levels are made here
    state_class = LogLinearState

    def __init__(
        self,
        d_model: int,
        *,
        n_levels: int = 15,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        A_init_range: tuple[float, float] = (1.0, 16.0),
        norm_eps: float = 1e-5,
        conv_bias: bool = True,
        bias: bool = False,
    ):
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            A_init_range=A_init_range,
            norm_eps=norm_eps,
            conv_bias=conv_bias,
            bias=bias,
        )
        self.check_at_least(2, n_levels=n_levels)
        self.n_levels = n_levels
        self.l_proj = Linear(d_model, self.n_heads * n_levels, bias=bias)
        self.L = nn.Parameter(torch.ones(self.n_heads, n_levels, dtype=wide_dtype()))
        self.float32_parameters += ("L",)
        self.no_weight_decay = self.float32_parameters

    def initial_state(self, batch_size: int, max_length: int | None = None) -> LogLinearState:
        like = self.like(wide=True)
        return LogLinearState(
            conv=like.new_zeros(batch_size, self.d_conv - 1, self.d_conv_channels),
            ssm=like.new_zeros(batch_size, self.n_levels - 1, self.n_heads, self.d_state, self.headdim),
            position=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def mixing_flops(self, context: int) -> float:
        """For each state two to read it, two to keep it, and as Mamba-2; on average every other level has one."""
        levels = min(self.n_levels - 1, max(1, context.bit_length())) / 2
        return (1 + 4 * levels) * self.d_ssm * self.d_state + 2 * self.d_conv * self.d_conv_channels

    def mix(
        self, x: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LogLinearState | None]:
        before = cast(LogLinearState | None, state)
        _, _, z, xBC, dt = self.in_proj(x).split(self.splits, dim=-1)
        xBC, conv = convolve(self.conv1d, xBC, self.d_conv, "silu", None if before is None else before.conv, cu_seqlens)
        wide = precision(xBC)
        u, B, C = (t.to(wide) for t in self._split(xBC))
        delta = F.softplus(dt.to(wide) + self.dt_bias, threshold=40).clamp(*self.dt_limit)  # (b l h)
        scales = F.softplus(self.L.flatten() * self.l_proj(x).to(wide), threshold=40).unflatten(-1, self.L.shape)
        B, C = (t.repeat_interleave(self.n_heads // self.ngroups, dim=2) for t in (B, C))
        tokens = Tokens(delta[..., None] * u, -delta * finite_exp(self.A_log), B, C, scales)
        if before is None:
            y, after = recall(tokens, cu_seqlens), None
        else:
            y, levels, position = recall_further(tokens, before.ssm, before.position, cu_seqlens)
            after = LogLinearState(conv, levels, position)
        y = (y + self.D[:, None] * u).to(x.dtype).flatten(2)
        return self.out_proj(cast(GatedRMSNorm, self.norm)(y, z)), after
