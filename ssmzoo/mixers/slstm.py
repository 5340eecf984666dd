"""xLSTM's scalar memory (Beck et al. 2024, arXiv 2405.04517, figure 9): convolution, gates by heads, recurrence, norm.

Glossary:

    b: batch    l: length    h: heads    p: channels of a head; d_model = h p

One layer, for u (b l d_model)::

    c          = silu(conv1d(u))                     causal, channel by channel
    i, f, z, o = maps of c, c, u and u               block-diagonal, a block a head
    y          = the scalar memory of i, f, z, o     :func:`ssmkernels.slstm`; gates also see the last output
    out        = norm(y)                             within each head

There is no map out of the heads: the block's MLP, of width 4/3 and with a GELU gate as published, mixes them.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ssmkernels import slstm, slstm_step
from ssmzoo.init import starting, wide_dtype
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve
from ssmzoo.mixers._xlstm import CausalConv, HeadwiseLinear, may_step, small_init
from ssmzoo.norm import HeadLayerNorm
from ssmzoo.registry import register_mixer
from ssmzoo.state import State

GATES = ("igate", "fgate", "zgate", "ogate")

Cells = tuple[Tensor, Tensor, Tensor, Tensor]  # c, n, h and m


@dataclasses.dataclass
class SLSTMState(State):
    """What the convolution and the recurrence remember, float32; ``conv`` has no rows where there is no convolution."""

    conv: Tensor  # (s, d_conv - 1, d_model), the last inputs
    c: Tensor  # (s, h, p), as the next three
    n: Tensor
    h: Tensor
    m: Tensor


class Cell(nn.Module):
    """The recurrent weights and the gates' biases."""

    def __init__(self, n_heads: int, p: int):
        super().__init__()
        self.recurrent_kernel = nn.Parameter(torch.zeros(n_heads, p, 4, p))
        self.bias = nn.Parameter(torch.zeros(n_heads, 4, p, dtype=wide_dtype()))

    def forward(self, gates: Tensor, before: Cells | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Cells]:
        """Gates (b l 4 h p) → y (b l h p), and c, n, h and m, before → after."""
        R, bias = self.recurrent_kernel, self.bias
        if before is not None and gates.shape[1] == 1 and cu_seqlens is None and may_step(gates):
            return slstm_step(before, gates[:, 0], R, bias)[:, None], before
        found = slstm(gates, R, bias, initial_state=before, return_final_state=True, cu_seqlens=cu_seqlens)
        return cast("tuple[Tensor, Cells]", found)


@register_mixer("slstm")
class SLSTM(Mixer):
    """Scalar memory with an exponential input gate, from xLSTM: a nonlinear recurrence within each head.

    Args:
        d_model: width of input and output.
        n_heads: h, heads, which do not see one another.
        d_conv: width of the causal convolution before the gates i and f; 0 for none.
        conv_bias: a bias on the convolution.
        bias_init: how the forget gate's bias starts. "powerlaw": from 5 at a head's first channel to -7 at its last,
            by a power of the channel's place between 0.3 and 1.6 that rises with ``depth``; "linspace": evenly from 3
            to 6; "standard": all gates' uniform within ± 1/√d_model.
        recurrent_init: how recurrent weights start: "zeros", or "standard", uniform within ± 1/√d_model.
        depth: where the layer stands in its model, from 0 to 1, for "powerlaw".
        group_norm_weight: whether the norm has a weight for each channel.

    The names of its weights are those of the paper's code, but that ``igate`` feeds the gate i and ``fgate`` the gate
    f: the forward pass of that code, and so its checkpoints, have the two exchanged. The biases stay float32.
    """

    crosses_in_ops = True
    state_class = SLSTMState
    residual_projections = ()
    float32_parameters = ("slstm_cell.bias",)
    no_weight_decay = ("slstm_cell.bias",)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_conv: int = 4,
        conv_bias: bool = True,
        bias_init: Literal["powerlaw", "linspace", "standard"] = "powerlaw",
        recurrent_init: Literal["zeros", "standard"] = "zeros",
        depth: float = 0.0,
        group_norm_weight: bool = True,
    ):
        super().__init__(d_model)
        self.check_at_least(1, n_heads=n_heads)
        self.check_at_least(0, d_conv=d_conv)
        if d_model % n_heads:
            raise ValueError(f"SLSTM: `n_heads` must divide d_model, {d_model}; got {n_heads}")
        if not 0 <= depth <= 1:
            raise ValueError(f"SLSTM: `depth` must be from 0 to 1; got {depth}")
        self.n_heads, self.d_conv = n_heads, d_conv
        self.conv1d = CausalConv(d_model, d_conv, conv_bias) if d_conv else None
        for name in GATES:
            gate = HeadwiseLinear(d_model, n_heads)
            small_init(gate.weight, d_model)
            setattr(self, name, gate)
        self.slstm_cell = Cell(n_heads, d_model // n_heads)
        self.group_norm = HeadLayerNorm(d_model, n_heads, centred=True, weight=group_norm_weight)
        self._start(bias_init, recurrent_init, depth)

    @torch.no_grad()
    def _start(self, bias_init: str, recurrent_init: str, depth: float) -> None:
        bias, weight, bound = self.slstm_cell.bias, self.slstm_cell.recurrent_kernel, self.d_model**-0.5
        p = self.d_model // self.n_heads
        if recurrent_init == "standard":
            weight.uniform_(-bound, bound)
        if bias_init == "standard":
            bias.uniform_(-bound, bound)
        elif bias_init == "linspace":
            bias[:, 1] = starting(p, bias.dtype, lambda: torch.linspace(3, 6, p, dtype=bias.dtype))
        else:
            place = starting(p, bias.dtype, lambda: torch.linspace(0, 1, p, dtype=bias.dtype))
            bias[:, 1] = starting(p, bias.dtype, lambda: 5 - 12 * place ** (0.3 + 1.3 * depth))

    def initial_state(self, batch_size: int, max_length: int | None = None) -> SLSTMState:
        new, p = self.like(wide=True).new_zeros, self.d_model // self.n_heads
        rows = (new(batch_size, self.n_heads, p) for _ in range(4))
        return SLSTMState(new(batch_size, max(self.d_conv - 1, 0), self.d_model), *rows)

    def mixing_flops(self, context: int) -> float:
        """Two for each weight of the gates' maps and of the recurrence, two a tap."""
        return self.d_model * (16 * self.d_model / self.n_heads + 2 * self.d_conv)

    def mix(self, x: Tensor, state: SLSTMState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, SLSTMState | None]:
        c, conv = x, None if state is None else state.conv
        if self.conv1d is not None:
            c, conv = convolve(self.conv1d.conv, x, self.d_conv, "silu", conv, cu_seqlens)
        inputs = [cast(Tensor, getattr(self, name)(c if name in GATES[:2] else x)) for name in GATES]
        gates = torch.stack(inputs, dim=2).unflatten(-1, (self.n_heads, -1))  # (b l 4 h p)
        before = None if state is None else (state.c, state.n, state.h, state.m)
        y, after = self.slstm_cell(gates, before, cu_seqlens)
        return self.group_norm(y), None if state is None else SLSTMState(cast(Tensor, conv), *after)
