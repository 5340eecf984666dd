"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7 and figure 6).

Glossary:

    b: batch    l: length    d: d_ssm, channels of the recurrence    h: heads    p: headdim, channels of a head; d = h p
    g: ngroups, groups of heads that share B and C    n: d_state    w: d_conv, taps of the convolution
    A, D (h): learned, the same for every token              Δ (b l h), B and C (b l g n): made from the token itself

One layer, for u (b l d_model)::

    z, x, B, C, δ = in_proj(u)                  (b l d), (b l d), (b l g n) twice, (b l h); z is the gate
    x, B, C = silu(conv1d([x, B, C]))           causal, over w tokens, channel by channel
    Δ       = softplus(δ + dt_bias)             (b l h), within dt_limit
    h_t     = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ   (b h p n), the state: A is one number for a whole head
    y_t     = h_t C_t + D x_t                   (b l d)
    out     = out_proj(norm(y · silu(z)))       (b l d_model)

Against Mamba, Δ, B and C come from the input itself rather than from the convolution's output, so that all projections
are one product, and A is a number for each head, which turns the scan into matrix products (:func:`ssmkernels.ssd`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmkernels import causal_conv1d_step, mamba2_step, ssd, ssd_step
from ssmkernels.core.finite import finite_exp
from ssmkernels.native.calls import Calls
from ssmzoo.bidirectional import bidirectional as both_ways
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve
from ssmzoo.mixers._mamba2_token import prepare_parts, step_arguments
from ssmzoo.mixers._mamba2_weights import Direction, check_divides, checked_range, multipliers_of, new_weights
from ssmzoo.mixers._one_call import in_one_call
from ssmzoo.mixers._unit_values import matrix_of, unit_values
from ssmzoo.norm import GatedRMSNorm
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class Mamba2State(State):
    """What the convolution and the recurrence remember."""

    conv: Tensor  # (s, d_conv - 1, d_ssm + 2 ngroups d_state), the last inputs
    ssm: Tensor  # (s, h, p, n), float32


@register_mixer("mamba2")
class Mamba2(Mixer):
    """State-space dual: a gated linear recurrence with one decay a head, computed as matrix products.

    Args:
        d_model: width of input and output.
        d_state: n, state size of each channel.
        d_conv: width of the causal convolution before the recurrence.
        expand: d_inner = expand · d_model channels inside.
        headdim: p, channels of a head.
        ngroups: groups of heads that share B and C.
        d_ssm: channels of the recurrence; the other d_inner - d_ssm pass through a gated MLP beside it. All of them if
            None.
        dt_min, dt_max: Δ starts log-uniform between them.
        dt_init_floor: no Δ starts below it.
        dt_limit: the least and the most that Δ may be.
        A_init_range: -A starts uniform in it.
        D_has_hdim: D is a number for each channel rather than for each head.
        rmsnorm: whether the gated output is normalised; otherwise it is gated alone.
        norm_before_gate: whether the norm comes before the gate.
        norm_groups: the mean of squares is taken over so many groups of channels; as many as ``ngroups`` if None.
        norm_eps: added to the mean of squares.
        multipliers: of z, x, B, C and δ after the input projection, as in Falcon-H1 (arXiv 2507.22448); 1 each if None.
        conv_init: the convolution's weight starts uniform within ± conv_init; as PyTorch's own if None.
        conv_bias: a bias on the convolution.
        bias: biases on the input and output projections.
        chunk_size: tokens of a chunk, for the implementations that work in chunks; their own choice if None. Results
            are the same to rounding.
        bidirectional: a second convolution and recurrence, with weights of their own, read every sequence from its end;
            projections, gate and norm are shared, and the two outputs are added before the norm. Then it is not causal
            and has no state.

    The names of its weights and options are those of the published checkpoints; weights of the second direction end in
    ``_b``, as in :class:`~ssmzoo.mixers.mamba.Mamba`. A (as ``A_log``), D and Δ's bias stay float32.
    """

    crosses_in_ops = True
    state_class: type[State] = Mamba2State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        d_ssm: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        multipliers: tuple[float, ...] | None = None,
        conv_init: float | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        chunk_size: int | None = None,
        bidirectional: bool = False,
    ):
        super().__init__(d_model)
        self.look_ahead(bidirectional)
        self.check_at_least(1, d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups, chunk_size=chunk_size)
        self.d_inner = round(expand * d_model)
        if self.d_inner < 1 or self.d_inner != expand * d_model:
            raise ValueError(f"Mamba2: `expand` · d_model must be a whole number of channels; got {expand} · {d_model}")
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if not 1 <= self.d_ssm <= self.d_inner:
            raise ValueError(f"Mamba2: `d_ssm` must be between 1 and d_inner, {self.d_inner}; got {d_ssm}")
        check_divides("headdim", headdim, self.d_ssm, "channels of the recurrence, `d_ssm`")
        self.n_heads = self.d_ssm // headdim
        check_divides("ngroups", ngroups, self.n_heads, "heads, d_ssm / `headdim`")
        self.norm_groups = ngroups if norm_groups is None else norm_groups
        check_divides("norm_groups", self.norm_groups, self.d_ssm, "channels of the recurrence, `d_ssm`")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba2: 0 < `dt_min` <= `dt_max` must hold; got {dt_min} and {dt_max}")
        self.dt_limit = checked_range("dt_limit", dt_limit, 0.0)
        low, high = checked_range("A_init_range", A_init_range, 0.0)
        if low == 0 or high == math.inf:
            raise ValueError(f"Mamba2: `A_init_range` must be finite and above 0; got {tuple(A_init_range)}")
        self.d_state, self.d_conv, self.headdim, self.ngroups = d_state, d_conv, headdim, ngroups
        self.chunk_size, self.D_has_hdim = chunk_size, D_has_hdim

        self.d_conv_channels = self.d_ssm + 2 * ngroups * d_state  # of x, B and C
        d_mlp = self.d_inner - self.d_ssm
        self.splits = [d_mlp, d_mlp, self.d_ssm, self.d_conv_channels, self.n_heads]
        self.in_proj = Linear(d_model, sum(self.splits), bias=bias)
        maps = ngroups * d_state
        self.scale = None if multipliers is None else multipliers_of(multipliers, self.splits, maps)
        sizes = (self.d_conv_channels, d_conv, self.n_heads, self.d_ssm if D_has_hdim else self.n_heads)
        start = ((dt_min, dt_max, dt_init_floor), (low, high), conv_init, conv_bias)
        self.conv1d, self.dt_bias, self.A_log, self.D = new_weights(*sizes, *start)
        self.norm = (
            GatedRMSNorm(self.d_ssm, norm_eps, norm_before_gate, self.d_ssm // self.norm_groups) if rmsnorm else None
        )
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)
        self.float32_parameters = ("A_log", "D", "dt_bias")
        if bidirectional:
            self.conv1d_b, self.dt_bias_b, self.A_b_log, self.D_b = new_weights(*sizes, *start)
            self.float32_parameters += ("A_b_log", "D_b", "dt_bias_b")
        self.no_weight_decay = self.float32_parameters

    def initial_state(self, batch_size: int, max_length: int | None = None) -> Mamba2State:
        self.check_has_state()
        new = self.like(wide=True).new_zeros
        return Mamba2State(
            conv=new(batch_size, self.d_conv - 1, self.d_conv_channels),
            ssm=new(batch_size, self.n_heads, self.headdim, self.d_state),
        )

    def mixing_flops(self, context: int) -> float:
        """Five a state and channel for the recurrence, two a tap for the convolution; each way."""
        one_way = 5 * self.d_ssm * self.d_state + 2 * self.d_conv * self.d_conv_channels
        return one_way * (2 if self.bidirectional else 1)

    def mix(self, x: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Mamba2State | None]:
        one = state is not None and x.shape[1] == 1 and cu_seqlens is None
        if one and self._may_step(x):
            return self._whole_step(x, cast(Mamba2State, state)), state
        mlp_gate, mlp, z, xBC, dt = self._projected(x)
        weights = Direction(self.conv1d, self.dt_bias, self.A_log, self.D)
        if self.bidirectional:
            y = self._both_ways(weights, xBC, dt, cu_seqlens)
        elif one and in_one_call(x, self._modules["conv1d"]):
            y = self._step(weights, xBC[:, 0], dt[:, 0], cast(Mamba2State, state))[:, None]
        else:
            y, after = self._ssm(weights, xBC, dt, state, cu_seqlens)
            state = None if state is None else after
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)  # (b l d)
        if mlp.shape[-1]:
            y = torch.cat([F.silu(mlp_gate) * mlp, y], dim=-1)  # (b l d_inner)
        return self.out_proj(y), state

    def _ssm(
        self, w: Direction, xBC: Tensor, dt: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Mamba2State]:
        """Convolution and recurrence: x, B and C (b l c), δ (b l h) → y (b l d), and the state after."""
        conv, ssm = (None, None) if state is None else (state.conv, state.ssm)
        xBC, conv = convolve(w.conv1d, xBC, self.d_conv, "silu", conv, cu_seqlens)
        x, B, C = self._split(xBC)
        y, ssm = ssd(
            x,
            dt.to(x.dtype),
            -finite_exp(w.A_log),
            B,
            C,
            self._skip(w.D),
            dt_bias=w.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            chunk_size=self.chunk_size,
            initial_state=ssm,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return rearrange(y, "b l h p -> b l (h p)"), Mamba2State(conv, ssm)

    def matrix(self, x: Tensor) -> Tensor:
        if self.bidirectional:
            return super().matrix(x)
        _, _, _, xBC, dt = self._projected(x)
        _, B, C = self._split(convolve(self.conv1d, xBC, self.d_conv, "silu", None, None)[0])
        dt_options: dict[str, Any] = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}
        unit = unit_values(B, self.n_heads)
        return matrix_of(cast(Tensor, ssd(unit, dt.to(B.dtype), -finite_exp(self.A_log), B, C, **dt_options)))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """The MLP's gate and values, z, [x, B, C] and δ of the layer's input."""
        projected = self.in_proj(x) if self.scale is None else self.scale(self.in_proj(x))
        return tuple(projected.split(self.splits, dim=-1))

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(… c) → x (… h p), B and C (… g n)."""
        x, B, C = xBC.split([self.d_ssm, *[self.ngroups * self.d_state] * 2], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.n_heads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _skip(self, D: Tensor) -> Tensor:
        return D.view(self.n_heads, self.headdim) if self.D_has_hdim else D

    def _both_ways(self, weights: Direction, xBC: Tensor, dt: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The sum of both directions: x, B and C (b l c), δ (b l h) → (b l d)."""
        reverse = Direction(self.conv1d_b, self.dt_bias_b, self.A_b_log, self.D_b)

        def way(w: Direction) -> Callable[[Tensor], Tensor]:
            def read(both: Tensor) -> Tensor:
                xBC, dt = both.split([self.d_conv_channels, self.n_heads], dim=-1)
                return self._ssm(w, xBC, dt, None, cu_seqlens)[0]

            return read

        return both_ways(way(weights), way(reverse), torch.cat([xBC, dt.to(xBC.dtype)], dim=-1), cu_seqlens)

    # One token, whose state is updated in place.

    def _whole_step(self, x: Tensor, state: Mamba2State) -> Tensor:
        """One token of the layer in one call, which gives the same: (b 1 d_model) → (b 1 d_model)."""
        arguments, options = step_arguments(self, x[:, 0], state)
        return mamba2_step(*arguments, **options)[:, None]

    def prepare_step(self, calls: Calls, x: Tensor, state: Mamba2State) -> Tensor | None:
        if self._may_step(x):
            arguments, options = step_arguments(self, x, state)
            return calls.op(mamba2_step, *arguments, **options)
        return prepare_parts(self, calls, x, state)

    def _may_step(self, x: Tensor) -> bool:
        """Whether :func:`ssmkernels.mamba2_step` may compute the whole layer."""
        m = self._modules
        return self.scale is None and in_one_call(x, m["in_proj"], m["conv1d"], m["out_proj"], norm=m.get("norm"))

    def _step(self, w: Direction, xBC: Tensor, dt: Tensor, state: Mamba2State) -> Tensor:
        """One token of :meth:`_ssm`, where a projection or the norm is called: (b c), (b h) → (b d)."""
        conv1d = cast(nn.Conv1d, w.conv1d)
        xBC = causal_conv1d_step(state.conv, xBC, conv1d.weight.squeeze(1), conv1d.bias, "silu")
        x, B, C = self._split(xBC)
        A, D = -finite_exp(w.A_log), self._skip(w.D)
        y = ssd_step(state.ssm, x, dt, A, B, C, D, dt_bias=w.dt_bias, dt_softplus=True, dt_limit=self.dt_limit)
        return y.flatten(1)
