"""The recurrent block of Griffin and Hawk (De et al. 2024, arXiv 2402.19427, sections 2.2 and 2.4).

Glossary: b batch, l length, d: width, channels of the recurrence. For u (b l d_model)::

    y   = gelu(linear_y(u))                           (b l d), the gate
    x   = conv_1d(linear_x(u))                        (b l d), causal, over d_conv tokens
    r_t = σ(W_a x_t + b_a),  i_t = σ(W_x x_t + b_x)   (b l d); W block-diagonal, a block for each head
    a_t = exp(-8 r_t softplus(Λ))                     (b l d), the decay; Λ (d) is learned
    h_t = a_t h_{t-1} + √(1 - a_t²) (i_t x_t)         (b l d), the state; the factor is 1 at a sequence's first token
    out = linear_out(h · y)                           (b l d_model)
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmkernels import linear_recurrence, rglru_gates
from ssmkernels.core.crossing import in_whole, whole_lengths
from ssmzoo.init import wide_dtype
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve
from ssmzoo.registry import register_mixer
from ssmzoo.state import State

C = 8.0  # scales the logarithm of the decay


@dataclasses.dataclass
class RGLRUState(State):
    """What the convolution and the recurrence remember, and whether a sequence has begun."""

    conv: Tensor  # (s, d_conv - 1, d), the last inputs
    h: Tensor  # (s, d), float32
    begun: Tensor  # (s), bool


class Gates(nn.Module):
    """The weights of the real-gated linear recurrent unit, under their published names."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads, block = n_heads, width // n_heads
        self.recurrent_param = nn.Parameter(torch.empty(width, dtype=wide_dtype()))  # Λ
        for gate in ("input_gate", "recurrent_gate"):
            self.register_parameter(f"{gate}_weight", nn.Parameter(torch.empty(n_heads, block, block)))
            self.register_parameter(f"{gate}_bias", nn.Parameter(torch.empty(n_heads, block)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Λ so that -softplus(Λ) = ½ log u with u uniform in (0.9², 0.999²); gates as maps of unit gain, half open."""
        if self.recurrent_param.is_meta:
            return
        square = torch.empty_like(self.recurrent_param).uniform_(0.9**2, 0.999**2)
        self.recurrent_param.copy_(torch.log(torch.expm1(-0.5 * torch.log(square))))
        for gate in ("input_gate", "recurrent_gate"):
            weight = self.get_parameter(f"{gate}_weight")
            weight.normal_(std=weight.shape[1] ** -0.5)
            self.get_parameter(f"{gate}_bias").zero_()

    def of_both(self, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weights or biases of both gates side by side, in their own dtype or another."""
        gates = ("recurrent_gate", "input_gate")
        return torch.cat([getattr(self, f"{gate}_{part}").to(dtype) for gate in gates], dim=-1)

    def forward(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """x (b l d) and, int32 (b l), which tokens are a sequence's first → a in float32 and √(1 - a²) i x, (b l d)."""
        # One product for both gates: x and its gradient are read and written once
        weight, bias = (self.of_both(part, x.dtype) for part in ("weight", "bias"))  # (h p 2p), (h 2p)
        heads = rearrange(x, "b l (h p) -> b l h p", h=self.n_heads)
        logits = torch.baddbmm(bias[:, None], heads.flatten(0, 1).transpose(0, 1), weight)  # (h bl 2p)
        logits = logits.transpose(0, 1).unflatten(0, x.shape[:2])
        a, b = rglru_gates(heads, logits, -C * F.softplus(self.recurrent_param).view(self.n_heads, -1), first)
        return a.flatten(2), b.flatten(2)


@register_mixer("rglru")
class RGLRU(Mixer):
    """Griffin's recurrent block: a diagonal recurrence whose decay and input are gated, beside a gating branch.

    Args:
        d_model: width of input and output.
        width: d, channels of the recurrence; d_model if None.
        n_heads: blocks of the gates' weights.
        d_conv: width of the causal convolution before the recurrence.
        conv_bias: a bias on the convolution.
        bias: biases on the three projections.

    The names of its weights are those of RecurrentGemma's checkpoints. Λ stays float32.
    """

    crosses_in_ops = True
    state_class = RGLRUState
    residual_projections = ("linear_out",)
    float32_parameters = ("rg_lru.recurrent_param",)
    no_weight_decay = ("rg_lru.recurrent_param", "rg_lru.input_gate_bias", "rg_lru.recurrent_gate_bias")

    def __init__(
        self,
        d_model: int,
        *,
        width: int | None = None,
        n_heads: int = 1,
        d_conv: int = 4,
        conv_bias: bool = True,
        bias: bool = True,
    ):
        super().__init__(d_model)
        self.width = d_model if width is None else width
        self.check_at_least(1, width=self.width, n_heads=n_heads, d_conv=d_conv)
        if self.width % n_heads:
            raise ValueError(f"RGLRU: `n_heads` must divide the {self.width} channels of the recurrence; got {n_heads}")
        self.d_conv, self.n_heads = d_conv, n_heads
        self.linear_y = Linear(d_model, self.width, bias=bias)
        self.linear_x = Linear(d_model, self.width, bias=bias)
        # Holds the weight and bias under their published names; the op does the convolution.
        self.conv_1d = nn.Conv1d(self.width, self.width, d_conv, groups=self.width, bias=conv_bias)
        self.rg_lru = Gates(self.width, n_heads)
        self.linear_out = Linear(self.width, d_model, bias=bias)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> RGLRUState:
        new = self.like(wide=True).new_zeros
        return RGLRUState(
            conv=new(batch_size, self.d_conv - 1, self.width),
            h=new(batch_size, self.width),
            begun=new(batch_size, dtype=torch.bool),
        )

    def mixing_flops(self, context: int) -> float:
        """Two for each weight of the gates, two a tap, and two of the recurrence."""
        return self.width * (4 * self.width / self.n_heads + 2 * self.d_conv + 2)

    @torch.no_grad()
    def matrices(self) -> list[Tensor]:
        return list(self.rg_lru.of_both("weight").transpose(1, 2).contiguous())

    def mix(self, x: Tensor, state: RGLRUState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, RGLRUState | None]:
        y = F.gelu(self.linear_y(x), approximate="tanh")  # (b l d)
        conv, h, begun = (None, None, None) if state is None else (state.conv, state.h, state.begun)
        x, conv = convolve(self.conv_1d, self.linear_x(x), self.d_conv, None, conv, cu_seqlens)
        a, b = self.rg_lru(x, self._first(x, begun, cu_seqlens))
        found = linear_recurrence(a, b, initial_state=h, return_final_state=True, cu_seqlens=cu_seqlens)
        out, h = cast(tuple[Tensor, Tensor], found)
        if state is not None:
            state = RGLRUState(conv, h, self._after(state.begun, x.shape[1], cu_seqlens))
        return self.linear_out(out * y), state

    def _first(self, x: Tensor, begun: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """1 where a token is the first of its sequence, int32 (b l)."""
        position = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is None:
            first = (position == 0).expand(x.shape[:2])
            first = first if begun is None else first & ~begun[:, None]
        else:
            sequence = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
            first = in_whole(sequence, position - cu_seqlens.long()[sequence]) == 0
            first = (first if begun is None else first & ~begun[sequence])[None]
        return first.int()

    def _after(self, begun: Tensor, length: int, cu_seqlens: Tensor | None) -> Tensor:
        """Which sequences have begun after this call: an empty one has not."""
        if cu_seqlens is None:
            return begun if length == 0 else torch.ones_like(begun)
        return begun | (whole_lengths(cu_seqlens) > 0)
