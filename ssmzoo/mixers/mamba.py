"""Mamba's mixer (Gu and Dao 2023, arXiv 2312.00752, section 3.4 and figure 3)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ssmkernels import mamba_step, rms_norm, selective_scan
from ssmzoo.init import inverse_softplus_of_log_uniform, wide_dtype
from ssmzoo.linear import Linear, WideBiasLinear, is_plain
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class MambaState(State):
    """What the convolution and the scan remember."""

    conv: Tensor  # (s, d_conv - 1, d_inner), the last inputs
    ssm: Tensor  # (s, d_inner, d_state), float32


class Direction(NamedTuple):
    """The weights that belong to one direction of time."""

    conv1d: nn.Module  # a Conv1d with weight (d_inner, 1, d_conv), as the other two if nothing replaces it
    x_proj: nn.Module  # d_inner → dt_rank + 2 d_state
    dt_proj: nn.Module  # dt_rank → d_inner
    A_log: Tensor  # (d_inner, d_state)
    D: Tensor  # (d_inner)


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
        bcdt_norm: divides B, C and the dt_rank numbers that Δ is made of by their root mean square, without weights, as
            Falcon Mamba does to train stably (Zuo et al. 2024, arXiv 2410.05355).
        bcdt_norm_eps: added to the mean of squares in those norms.
        bidirectional: a second convolution and scan, with weights of their own, read every sequence from its end; the
            projections in and out and the gate are shared, and the two outputs are added before the last of them
            (Vision Mamba, Zhu et al. 2024, arXiv 2401.09417, algorithm 1). Then it is not causal and has no state.

    The names of its weights are those of the published checkpoints; the second direction has Vision Mamba's. A (as
    ``A_log``), D and Δ's bias stay float32.
    """

    state_class = MambaState

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
        bcdt_norm: bool = False,
        bcdt_norm_eps: float = 1e-6,
        bidirectional: bool = False,
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
        if bcdt_norm_eps < 0:
            raise ValueError(f"Mamba: `bcdt_norm_eps` must not be negative; got {bcdt_norm_eps}")
        self.d_state, self.d_conv = d_state, d_conv
        self.bcdt_norm, self.bcdt_norm_eps, self.bidirectional = bcdt_norm, bcdt_norm_eps, bidirectional
        self.causal = not bidirectional

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D = self._new_direction(conv_bias)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)
        directions = [self.dt_proj]
        if bidirectional:
            self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b = self._new_direction(conv_bias)
            directions.append(self.dt_proj_b)
        own = ("A_log", "D", "dt_proj.bias", *(("A_b_log", "D_b", "dt_proj_b.bias") if bidirectional else ()))
        self.float32_parameters = self.no_weight_decay = own

        bound = dt_scale * self.dt_rank**-0.5
        with torch.no_grad():
            for dt_proj in directions:
                if dt_init == "constant":
                    dt_proj.weight.fill_(bound)
                else:
                    dt_proj.weight.uniform_(-bound, bound)
                dt_bias = inverse_softplus_of_log_uniform(self.d_inner, dt_min, dt_max, dt_init_floor)
                dt_proj.bias = nn.Parameter(dt_bias)  # a new one: the default dtype may be too narrow

    def _new_direction(
        self, conv_bias: bool
    ) -> tuple[nn.Conv1d, nn.Linear, WideBiasLinear, nn.Parameter, nn.Parameter]:
        """Fresh weights in the order of :class:`Direction`; those of Δ are set afterwards."""
        d_inner, n = self.d_inner, self.d_state
        return (
            # Holds the weight and bias under their published names; the op does the convolution.
            nn.Conv1d(d_inner, d_inner, self.d_conv, groups=d_inner, bias=conv_bias),
            nn.Linear(d_inner, self.dt_rank + 2 * n, bias=False),
            WideBiasLinear(self.dt_rank, d_inner),
            nn.Parameter(torch.arange(1, n + 1, dtype=wide_dtype()).log().repeat(d_inner, 1)),  # S4D-real
            nn.Parameter(torch.ones(d_inner, dtype=wide_dtype())),
        )

    def initial_state(self, batch_size: int, max_length: int | None = None) -> MambaState:
        new = self.like(wide=True).new_zeros
        return MambaState(
            conv=new(batch_size, self.d_conv - 1, self.d_inner), ssm=new(batch_size, self.d_inner, self.d_state)
        )

    def mixing_flops(self, context: int) -> float:
        """Six a state and channel for the scan (decay, input, output), two a tap for the convolution; each way."""
        return self.d_inner * (6 * self.d_state + 2 * self.d_conv) * (2 if self.bidirectional else 1)

    def mix(self, x: Tensor, state: MambaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, MambaState | None]:
        if state is not None and x.shape[1] == 1 and cu_seqlens is None and self._may_step(x):
            return self._step(x, state), state
        xz = self.in_proj(x)  # (b l 2 d_inner)
        forward = Direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        y, after = self._along(forward, xz, state, cu_seqlens)
        if self.bidirectional:
            order = None if cu_seqlens is None else backwards(cu_seqlens, x.shape[1])
            reverse = Direction(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
            y = y + _in_order(self._along(reverse, _in_order(xz, order), None, cu_seqlens)[0], order)
        return self.out_proj(y), None if state is None else after

    def _along(
        self, w: Direction, xz: Tensor, state: MambaState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        """Convolution and gated scan in one direction: x beside z (b l 2 d_inner) → y (b l d_inner), state after."""
        x, z = xz.chunk(2, dim=-1)  # (b l d_inner) each
        x, conv = convolve(w.conv1d, x, self.d_conv, "silu", None if state is None else state.conv, cu_seqlens)
        dt, bias, B, C = self._dt_B_C(x, w.x_proj, w.dt_proj)
        y, ssm = selective_scan(
            x,
            dt,
            -torch.exp(w.A_log),
            B,
            C,
            w.D,
            z,
            bias,
            delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return y, MambaState(conv, ssm)

    def _may_step(self, x: Tensor) -> bool:
        """Whether one call may stand for the whole layer: all of its maps are plain, and nobody listens to them."""
        m = self._modules
        return (
            not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and is_plain(m["in_proj"], m["conv1d"], m["x_proj"], m["dt_proj"], m["out_proj"])
        )

    def _step(self, x: Tensor, state: MambaState) -> Tensor:
        in_proj, conv1d, dt_proj, out_proj = self.in_proj, self.conv1d, self.dt_proj, self.out_proj
        y = mamba_step(
            state.conv,
            state.ssm,
            x[:, 0],
            in_proj.weight,
            in_proj.bias,
            conv1d.weight.squeeze(1),
            conv1d.bias,
            self.x_proj.weight,
            dt_proj.weight,
            dt_proj.bias,
            self.A_log,
            self.D,
            out_proj.weight,
            out_proj.bias,
            norm_eps=self.bcdt_norm_eps if self.bcdt_norm else None,
        )
        return y[:, None]

    def _dt_B_C(self, x: Tensor, x_proj: nn.Module, dt_proj: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(..., d_inner) → Δ (..., d_inner) and the bias that it still lacks, if any; B and C (..., d_state)."""
        dt, B, C = x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.bcdt_norm:
            dt, B, C = (self._normed(t) for t in (dt, B, C))
        if is_plain(dt_proj):  # the scan adds the bias, in float32
            assert isinstance(dt_proj, nn.Linear)
            return nn.functional.linear(dt, dt_proj.weight), dt_proj.bias, B, C
        return dt_proj(dt).to(x.dtype), None, B, C

    def _normed(self, x: Tensor) -> Tensor:
        return cast(Tensor, rms_norm(x, x.new_ones(x.shape[-1]), eps=self.bcdt_norm_eps))


def backwards(cu_seqlens: Tensor, length: int) -> Tensor:
    """int64 ``(length)``: for each position of a packed batch, the one that mirrors it within its own sequence."""
    position = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], position, right=True)
    return (cu_seqlens[sequence] + cu_seqlens[sequence + 1] - 1 - position).long()


def _in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """(b l d) with its time axis in another order; mirrored if None."""
    return x.flip(1) if order is None else x.index_select(1, order)
