"""Mamba's mixer (Gu and Dao 2023, arXiv 2312.00752, section 3.4 and figure 3)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from ssmkernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from ssmzoo.mixers._base import Mixer
from ssmzoo.mixers._init import inverse_softplus_of_log_uniform
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class MambaState(State):
    """What the convolution and the scan remember."""

    conv: Tensor  # (s, d_conv - 1, d_inner), the last inputs
    ssm: Tensor  # (s, d_inner, d_state), float32


@register_mixer("mamba")
class Mamba(Mixer):
    """Selective state space: a gated linear recurrence whose step size and maps depend on the input.

    Args:
        d_model: width of input and output.
        d_state: n, state size of each channel.
        d_conv: width of the causal convolution before the scan.
        expand: d_inner = expand · d_model channels inside.
        dt_rank: rank of the projection that makes Δ; ``"auto"`` is ⌈d_model / 16⌉.
        dt_min, dt_max: Δ starts log-uniform between them.
        dt_init: how the weight of Δ's projection starts: ``"random"``, uniform within ± dt_scale · dt_rank^-½, or
            ``"constant"``.
        dt_scale: scales that start.
        dt_init_floor: no Δ starts below it.
        conv_bias: a bias on the convolution.
        bias: biases on the input and output projections.

    The names of its weights are those of the published checkpoints. A (as ``A_log``), D and Δ's bias stay float32.
    """

    state_class = MambaState
    float32_parameters = ("A_log", "D", "dt_proj.bias")
    no_weight_decay = ("A_log", "D", "dt_proj.bias")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ):
        super().__init__(d_model)
        for name, value in (("d_state", d_state), ("d_conv", d_conv)):
            if value < 1:
                raise ValueError(f"Mamba: `{name}` must be at least 1; got {value}")
        self.d_inner = round(expand * d_model)
        if self.d_inner < 1 or self.d_inner != expand * d_model:
            raise ValueError(f"Mamba: `expand` · d_model must be a whole number of channels; got {expand} · {d_model}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba: 0 < `dt_min` <= `dt_max` must hold; got {dt_min} and {dt_max}")
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        if self.dt_rank < 1:
            raise ValueError(f"Mamba: `dt_rank` must be at least 1; got {dt_rank}")
        self.d_state, self.d_conv = d_state, d_conv

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        # Holds the weight (d_inner, 1, d_conv) and bias under their published names; the op does the convolution.
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(self.d_inner, 1))  # S4D-real
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

        bound = dt_scale * self.dt_rank**-0.5
        with torch.no_grad():
            if dt_init == "constant":
                self.dt_proj.weight.fill_(bound)
            else:
                self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(inverse_softplus_of_log_uniform(self.d_inner, dt_min, dt_max, dt_init_floor))

    def initial_state(self, batch_size: int, max_length: int | None = None) -> MambaState:
        new = self.A_log.new_zeros
        return MambaState(
            conv=new(batch_size, self.d_conv - 1, self.d_inner), ssm=new(batch_size, self.d_inner, self.d_state)
        )

    def mixing_flops(self, context: int) -> float:
        """Six a state and channel for the scan (decay, input, output), two a tap for the convolution."""
        return self.d_inner * (6 * self.d_state + 2 * self.d_conv)

    def mix(self, x: Tensor, state: MambaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, MambaState | None]:
        if state is not None and x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            return self._step(x, state), state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b l d_inner) each
        x, conv = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            "silu",
            initial_state=None if state is None else state.conv,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        dt, B, C = self._dt_B_C(x)
        y, ssm = selective_scan(
            x,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(y), None if state is None else MambaState(conv, ssm)

    def _step(self, x: Tensor, state: MambaState) -> Tensor:
        x, z = self.in_proj(x[:, 0]).chunk(2, dim=-1)  # (b d_inner) each
        x = causal_conv1d_step(state.conv, x, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self._dt_B_C(x)
        A = -torch.exp(self.A_log)
        y = selective_scan_step(state.ssm, x, dt, A, B, C, self.D, z, self.dt_proj.bias, delta_softplus=True)
        return self.out_proj(y)[:, None]

    def _dt_B_C(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d_inner) → Δ before its bias (..., d_inner), B and C (..., d_state)."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return nn.functional.linear(dt, self.dt_proj.weight), B, C
