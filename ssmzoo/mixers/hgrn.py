"""The hierarchically gated recurrent network (Qin et al. 2023, arXiv 2311.04823, section 3).

Glossary: b batch, l length, d: d_inner, channels of the recurrence. For x (b l d_model)::

    u_t = silu(i_proj(x_t))               (b l d), the input
    f_t = γ + (1 - γ) σ(f_proj(x_t))      (b l d), the forget gate; γ (d) rises with depth, see ssmzoo.lower_bounds
    h_t = f_t h_{t-1} + (1 - f_t) u_t     (b l d), the state
    out = o_proj(g_norm(h) · silu(g_proj(x)))         (b l d_model)

This is the layer that flash-linear-attention made common. The paper's own state is complex: with ``complex_state``,
f turns by an angle θ (d) that is learned and the same at all times, u is complex, and the parts of h lie side by side::

    h_t = f_t exp(iθ) h_{t-1} + (1 - f_t) u_t         (b l d), complex; real and imaginary parts of u by turns
    out = o_proj(g_norm([Re h, Im h]) · silu(g_proj(x)))

The paper's setting is ``complex_state=True, norm="layer", bias=True``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import linear_recurrence
from ssmzoo.bidirectional import bidirectional as both_ways
from ssmzoo.init import starting
from ssmzoo.linear import Linear
from ssmzoo.lower_bounds import BoundedMixer
from ssmzoo.mixers._convolution import convolve
from ssmzoo.norm import GatedRMSNorm, LayerNorm
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class HGRNState(State):
    """The last h of each sequence, and what the convolutions remember, where there are any."""

    h: Tensor  # (s, d), float32, or complex64
    i_conv: Tensor | None = None  # (s, d_conv - 1, channels of u)
    f_conv: Tensor | None = None  # (s, d_conv - 1, d)


@register_mixer("hgrn")
class HGRN(BoundedMixer):
    """HGRN: a linear recurrence whose forget gates have lower bounds that rise with depth.

    Args:
        d_model: width of input and output.
        expand_ratio: the recurrence has ⌊expand_ratio · d_model⌋ channels.
        use_short_conv: causal convolutions after i_proj and f_proj.
        d_conv: their width.
        conv_bias: biases on them.
        complex_state: a complex state that turns by a learned angle, as in the paper.
        use_lower_bound: lower bounds of the forget gates, from the model around the mixer.
        norm: of the state, ``"rms"`` or ``"layer"``.
        norm_eps: added to the mean square, or the variance.
        bias: biases on the four projections.
        bidirectional: adds the states from the end, before the norm; then it is not causal and has no state.

    The names of its weights are those of flash-linear-attention.
    """

    crosses_in_ops = True
    state_class = HGRNState
    residual_projections = ("o_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        expand_ratio: float = 1.0,
        use_short_conv: bool = False,
        d_conv: int = 4,
        conv_bias: bool = False,
        complex_state: bool = False,
        use_lower_bound: bool = True,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-5,
        bias: bool = False,
        bidirectional: bool = False,
    ):
        d = int(expand_ratio * d_model)
        super().__init__(d_model, d, use_lower_bound)
        if d < 1:
            raise ValueError(f"HGRN: `expand_ratio` · d_model must be at least 1; got {expand_ratio} · {d_model}")
        self.check_at_least(1, d_conv=d_conv)
        self.look_ahead(bidirectional)
        self.d_inner, self.d_conv, self.complex_state, self.use_short_conv = d, d_conv, complex_state, use_short_conv
        numbers = 2 * d if complex_state else d
        self.i_proj = Linear(d_model, numbers, bias=bias)
        self.f_proj = Linear(d_model, d, bias=bias)
        self.g_proj = Linear(d_model, numbers, bias=bias)
        if use_short_conv:
            for name, width in (("i_conv1d", numbers), ("f_conv1d", d)):
                self.add_module(name, nn.Conv1d(width, width, d_conv, groups=width, bias=conv_bias))
        if complex_state:
            self.theta = nn.Parameter(starting(d, None, lambda: 10000.0 ** (-2 / d * torch.arange(d))))
            self.no_weight_decay = ("theta",)
        self.g_norm: nn.Module
        self.norm, self.numbers = norm, numbers
        if norm == "rms":
            self.g_norm = GatedRMSNorm(numbers, eps=norm_eps, norm_before_gate=True)
        else:
            self.g_norm = LayerNorm(numbers, eps=norm_eps)
        self.o_proj = Linear(numbers, d_model, bias=bias)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> HGRNState:
        self.check_has_state()
        like = self.like(wide=True)
        dtype = like.dtype.to_complex() if self.complex_state else like.dtype
        state = HGRNState(like.new_zeros(batch_size, self.d_inner, dtype=dtype))
        if self.use_short_conv:
            state.i_conv = like.new_zeros(batch_size, self.d_conv - 1, self.numbers)
            state.f_conv = like.new_zeros(batch_size, self.d_conv - 1, self.d_inner)
        return state

    def mixing_flops(self, context: int) -> float:
        """Four of the real recurrence, or ten of the complex one, in each direction; two for each tap."""
        ways = 2 if self.bidirectional else 1
        taps = 2 * self.d_conv * (self.numbers + self.d_inner) if self.use_short_conv else 0
        return self.d_inner * (10 if self.complex_state else 4) * ways + taps

    def mix(self, x: Tensor, state: HGRNState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, HGRNState | None]:
        u, f, gate = self.i_proj(x), self.f_proj(x), self.g_proj(x)
        after = None if state is None else HGRNState(state.h)
        if self.use_short_conv:
            before = (None, None) if state is None else (state.i_conv, state.f_conv)
            u, i_conv = convolve(self.get_submodule("i_conv1d"), u, self.d_conv, None, before[0], cu_seqlens)
            f, f_conv = convolve(self.get_submodule("f_conv1d"), f, self.d_conv, None, before[1], cu_seqlens)
            if after is not None:
                after.i_conv, after.f_conv = i_conv, f_conv
        a, b = self._terms(F.silu(u), f)
        if self.bidirectional:

            def scan(terms: Tensor) -> Tensor:
                return cast(Tensor, linear_recurrence(*terms.unbind(-1), cu_seqlens=cu_seqlens))

            h = both_ways(scan, scan, torch.stack([a, b.to(a.dtype)], dim=-1), cu_seqlens)  # the same terms both ways
        else:
            found = linear_recurrence(
                a,
                b,
                initial_state=None if state is None else state.h,
                return_final_state=True,
                cu_seqlens=cu_seqlens,
            )
            h, last = cast(tuple[Tensor, Tensor], found)
            if after is not None:
                after.h = last
        if h.is_complex():
            h = torch.cat([h.real, h.imag], dim=-1)
        return self.o_proj(self._gated(h.to(x.dtype), gate)), after

    def _terms(self, u: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the logits of the forget gate → a and b of h_t = a_t h_{t-1} + b_t, both (b l d)."""
        forget, write = self.forget_gate(f)
        if not self.complex_state:
            return forget, (write * u).to(u.dtype)
        theta = self.theta.to(forget.dtype)
        a = torch.complex(forget * torch.cos(theta), forget * torch.sin(theta))
        pairs = u.to(forget.dtype).unflatten(-1, (self.d_inner, 2)).contiguous()
        return a, write * torch.view_as_complex(pairs)

    def _gated(self, h: Tensor, gate: Tensor) -> Tensor:
        """g_norm(h) · silu(gate)."""
        if self.norm == "layer":
            return self.g_norm(h) * F.silu(gate)
        return self.g_norm(h, gate)
