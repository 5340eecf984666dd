"""Mamba-3 (Lahoti et al. 2026, arXiv 2603.15569).

Glossary:

    b: batch    l: length    r: mimo_rank, inputs of a step; 1 for SISO    h: heads    p: headdim, channels of a head
    g: ngroups, groups of heads that share B and C    n: d_state    a: n_angles, pairs of B's dimensions that turn
    D (h), biases of B and C (h r n): learned, the same for every token
    Δ, A, λ (b l h), B and C (b l r g n), ω (b l a): made from the token itself

One layer, for u (b l d_model)::

    z, x, B, C, δ, A, λ, ω = in_proj(u)              (b l d) twice, (b l (r g n)) twice, (b l h) three times, (b l a)
    Δ, A, λ, ω = softplus(δ + dt_bias), -f(A), σ(λ), π tanh(ω)
    B, C    = norm(B), norm(C)                       over n
    θ_t     = θ_{t-1} + Δ_t ω_t                      (b h a); pairs of dimensions of B + bias and C + bias turn by θ
    h_t     = α_t (h_{t-1} + (1 - λ_t) Δ_t x_{t-1} B_{t-1}ᵀ) + λ_t Δ_t x_t B_tᵀ,   α_t = exp(Δ_t A_t)      (b h p n)
    y_t     = (h_t C_t + D x_t) · silu(z_t)          (b l d)
    out     = out_proj(y)                            (b l d_model)

Against Mamba-2, an input counts at its own step and at the next one (the trapezoidal rule), the state rotates, A
depends on the token, and there is no convolution. With MIMO a step has r inputs, x ∘ mimo_x, and r outputs, gated by
z ∘ mimo_z, whose sum weighted by mimo_o is y.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from ssmkernels import mamba3_scan, mamba3_scan_step
from ssmkernels.core.autocast import autocasts
from ssmkernels.native.calls import Calls
from ssmzoo.init import inverse_softplus_of_log_uniform, wide_dtype
from ssmzoo.linear import Linear, is_plain
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._mamba3_token import prepare_token
from ssmzoo.mixers._one_call import in_one_call
from ssmzoo.norm import GatedRMSNorm, RMSNorm
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x for x >= 0, 1 / (1 - x) below: positive, and smooth at 0."""
    return x.clamp(min=0) + 1 / (1 - x.clamp(max=0))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"softplus": F.softplus, "heavy_tail": heavy_tail}


@dataclasses.dataclass
class Mamba3State(State):
    """What the recurrence remembers, all of it in float32."""

    ssm: Tensor  # (s, h, p, n)
    angle: Tensor  # (s, h, a)
    key: Tensor  # (s, r, h, n), the last B as it was rotated
    value: Tensor  # (s, r, h, p), the last x


@register_mixer("mamba3")
class Mamba3(Mixer):
    """State-space dual with a trapezoidal update, a rotating state, and one or several inputs a step.

    Args:
        d_model: width of input and output.
        d_state: n, state size of each channel.
        expand: expand · d_model channels inside.
        headdim: p, channels of a head.
        ngroups: groups of heads that share B and C.
        rope_fraction: the part of the d_state dimensions that turns, an angle for each two of them.
        dt_min, dt_max: Δ starts log-uniform between them.
        dt_init_floor: no Δ starts below it.
        A_activation: what makes -A of its projection: "softplus", as in the released mamba_ssm 2.3, or "heavy_tail",
            1 + x above 0 and 1 / (1 - x) below, as in later versions.
        A_floor: -A is at least this.
        is_outproj_norm: each head's output is normalised before the gate.
        is_mimo: several inputs and outputs a step.
        mimo_rank: r, how many; 1 unless ``is_mimo``.
        norm_eps: added to the means of squares.
        chunk_size: inputs of a chunk, for the implementations that work in chunks; their own choice if None. Results
            are the same to rounding.

    The names of its weights and options are those of mamba_ssm. D, all biases and MIMO's weights stay float32. Pairs of
    dimensions that turn are neighbours for SISO and lie half of d_state apart for MIMO, as in its kernels.
    """

    crosses_in_ops = True
    state_class = Mamba3State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_activation: Literal["softplus", "heavy_tail"] = "softplus",
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
    ):
        super().__init__(d_model)
        self.check_at_least(1, headdim=headdim, ngroups=ngroups, mimo_rank=mimo_rank, chunk_size=chunk_size)
        self.check_at_least(2, d_state=d_state)
        self.check_at_least(0, A_floor=A_floor)
        self.d_inner = round(expand * d_model)
        if self.d_inner < 1 or self.d_inner != expand * d_model:
            raise ValueError(f"Mamba3: `expand` · d_model must be a whole number of channels; got {expand} · {d_model}")
        if self.d_inner % headdim:
            raise ValueError(f"Mamba3: `headdim` must divide the {self.d_inner} channels inside; got {headdim}")
        self.n_heads = self.d_inner // headdim
        if self.n_heads % ngroups:
            raise ValueError(f"Mamba3: `ngroups` must divide the {self.n_heads} heads; got {ngroups}")
        self.n_angles = int(d_state * rope_fraction) // 2
        if not 0 < rope_fraction <= 1 or self.n_angles < 1:
            raise ValueError(
                f"Mamba3: `rope_fraction` must be at most 1 and turn at least 2 of the {d_state} dimensions of "
                f"`d_state`; got {rope_fraction}"
            )
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba3: 0 < `dt_min` <= `dt_max` must hold; got {dt_min} and {dt_max}")
        if A_activation not in ACTIVATIONS:
            raise ValueError(f"Mamba3: `A_activation` must be one of {', '.join(ACTIVATIONS)}; got {A_activation!r}")
        self.d_state, self.headdim, self.ngroups = d_state, headdim, ngroups
        self.is_mimo, self.mimo_rank = is_mimo, mimo_rank if is_mimo else 1
        self.A_activation, self.A_floor, self.chunk_size = A_activation, A_floor, chunk_size

        h, r, p = self.n_heads, self.mimo_rank, headdim
        maps = r * ngroups * d_state
        self.splits = [self.d_inner, self.d_inner, maps, maps, h, h, h, self.n_angles]
        self.in_proj = Linear(d_model, sum(self.splits), bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus_of_log_uniform(h, dt_min, dt_max, dt_init_floor))
        self.B_bias = nn.Parameter(torch.ones(h, r, d_state, dtype=wide_dtype()))
        self.C_bias = nn.Parameter(torch.ones(h, r, d_state, dtype=wide_dtype()))
        self.B_norm, self.C_norm = RMSNorm(d_state, norm_eps), RMSNorm(d_state, norm_eps)
        self.float32_parameters = ("dt_bias", "D", "B_bias", "C_bias")
        if is_mimo:
            self.mimo_x = nn.Parameter(torch.full((h, r, p), 1 / r, dtype=wide_dtype()))
            self.mimo_z = nn.Parameter(torch.ones(h, r, p, dtype=wide_dtype()))
            self.mimo_o = nn.Parameter(torch.full((h, r, p), 1 / r, dtype=wide_dtype()))
            self.float32_parameters += ("mimo_x", "mimo_z", "mimo_o")
        self.D = nn.Parameter(torch.ones(h, dtype=wide_dtype()))
        self.norm = GatedRMSNorm(self.d_inner, norm_eps, True, headdim) if is_outproj_norm else None
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        self.no_weight_decay = ("dt_bias", "D")

    def initial_state(self, batch_size: int, max_length: int | None = None) -> Mamba3State:
        new, h = self.like(wide=True).new_zeros, self.n_heads
        return Mamba3State(
            ssm=new(batch_size, h, self.headdim, self.d_state),
            angle=new(batch_size, h, self.n_angles),
            key=new(batch_size, self.mimo_rank, h, self.d_state),
            value=new(batch_size, self.mimo_rank, h, self.headdim),
        )

    def mixing_flops(self, context: int) -> float:
        """Three a state and channel for the decay and the last input, four for each input and its output."""
        return (3 + 4 * self.mimo_rank) * self.d_inner * self.d_state

    def mix(self, x: Tensor, state: Mamba3State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Mamba3State | None]:
        z, x, B, C, dt, A, trap, angles = self.in_proj(x).split(self.splits, dim=-1)
        wide = self.dt_bias.dtype
        dt = F.softplus(dt.to(wide) + self.dt_bias)  # (b l h)
        A = -ACTIVATIONS[self.A_activation](A.to(wide)).clamp(min=self.A_floor)
        trap, angles = torch.sigmoid(trap.to(wide)), math.pi * torch.tanh(angles.to(wide))
        maps = (self.mimo_rank, self.ngroups, self.d_state)
        B, C = self.B_norm(B.unflatten(-1, maps)), self.C_norm(C.unflatten(-1, maps))  # (b l r g n)
        B, C = B.to(x.dtype), C.to(x.dtype)  # autocast leaves them in the dtype of the norms' weights
        x, z = self._inputs(x, "mimo_x"), self._inputs(z, "mimo_z")  # (b l r h p)
        gate = z if self.norm is None else None
        if state is not None and x.shape[1] == 1 and cu_seqlens is None and self._may_step(x):
            y = mamba3_scan_step(
                state.ssm,
                state.angle,
                state.key,
                state.value,
                x[:, 0],
                dt[:, 0],
                A[:, 0],
                B[:, 0],
                C[:, 0],
                trap[:, 0],
                angles[:, 0],
                self.B_bias,
                self.C_bias,
                self.D,
                None if gate is None else gate[:, 0],
                interleaved=not self.is_mimo,
            )[:, None]
        else:
            y, *after = mamba3_scan(
                x,
                dt,
                A,
                B,
                C,
                trap,
                angles,
                self.B_bias,
                self.C_bias,
                self.D,
                gate,
                interleaved=not self.is_mimo,
                chunk_size=self.chunk_size,
                initial_state=None if state is None else state.ssm,
                initial_angle=None if state is None else state.angle,
                initial_key=None if state is None else state.key,
                initial_value=None if state is None else state.value,
                return_final_state=True,
                cu_seqlens=cu_seqlens,
            )
            state = None if state is None else Mamba3State(*after)
        return self.out_proj(self._outputs(y, z)), state

    def _inputs(self, x: Tensor, weight: str) -> Tensor:
        """(b l d) → (b l r h p)."""
        x = rearrange(x, "b l (h p) -> b l 1 h p", p=self.headdim)
        if not self.is_mimo:
            return x
        return x * rearrange(getattr(self, weight).to(x.dtype), "h r p -> r h p")

    def _outputs(self, y: Tensor, z: Tensor) -> Tensor:
        """The recurrence's outputs and their gates (b l r h p) → (b l d)."""
        if self.norm is not None:
            flat = "b l r h p -> b l r (h p)"
            normed = self.norm(rearrange(y, flat), rearrange(z, flat))
            y = rearrange(normed, "b l r (h p) -> b l r h p", p=self.headdim)
        if not self.is_mimo:
            return rearrange(y, "b l 1 h p -> b l (h p)")
        y = einsum(y, self.mimo_o.to(y.dtype), "b l r h p, h r p -> b l h p")
        return rearrange(y, "b l h p -> b l (h p)")

    def prepare_step(self, calls: Calls, x: Tensor, state: Mamba3State) -> Tensor | None:
        m = self._modules
        if not in_one_call(x, norm=m.get("norm")) or not is_plain(m["B_norm"], m["C_norm"], kinds=(RMSNorm,)):
            return None
        return prepare_token(self, calls, x, state)

    def _may_step(self, x: Tensor) -> bool:
        """Whether the state may be updated in place: nobody wants gradients."""
        return not torch.is_grad_enabled() and not autocasts(x.device.type)
