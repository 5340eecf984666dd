"""Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.4 and figure 3).

Glossary, with the paper's letters where it has one:

    b: batch    l: length    d: d_inner = expand · d_model, channels inside (D)    n: d_state, states of a channel (N)
    w: d_conv, taps of the convolution        r: dt_rank, numbers that Δ is made of
    A (d n), D (d): learned, the same for every token        Δ (b l d), B and C (b l n): made from the token itself

One layer, for u (b l d_model); Δ, B and C select what a channel keeps of its past (algorithm 2)::

    x, z  = in_proj(u)                                (b l d) each; z is the gate
    x     = silu(conv1d(x))                           causal, over w tokens, channel by channel
    δ, B, C = x_proj(x)                               (b l r), (b l n), (b l n)
    Δ     = softplus(dt_proj(δ))                      (b l d)
    h_t   = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          (b d n), the state
    y_t   = C_t · h_t + D x_t                         (b l d)
    out   = out_proj(y · silu(z))                     (b l d_model)

B is discretised as Δ B, as in the authors' code, where the paper's equation 4 has the exact form for zero-order hold.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ssmkernels import (
    causal_conv1d_step,
    mamba_step,
    rms_norm,
    selective_scan,
    selective_scan_step,
)
from ssmkernels.core.autocast import widened
from ssmkernels.native.calls import Calls
from ssmkernels.native.eager import finite_exp
from ssmzoo.bidirectional import bidirectional as both_ways
from ssmzoo.init import inverse_softplus_of_log_uniform, starting, wide_dtype
from ssmzoo.linear import Linear, WideBiasLinear, is_plain, linear
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve
from ssmzoo.mixers._mamba_token import prepare_parts, step_arguments
from ssmzoo.mixers._one_call import in_one_call
from ssmzoo.norm import RMSNorm
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class MambaState(State):
    """What the convolution and the scan remember."""

    conv: Tensor  # (s, d_conv - 1, d_inner), the last inputs
    ssm: Tensor  # (s, d_inner, d_state), float32


class Selective(NamedTuple):
    """The weights of the convolution and the scan; a second direction has some of its own."""

    conv1d: nn.Module  # a Conv1d with weight (d 1 w), as the other two if nothing replaces it
    x_proj: nn.Module  # d → r + 2 n
    dt_proj: nn.Module  # r → d
    A_log: Tensor  # (d n)
    D: Tensor  # (d)


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
            Falcon Mamba does to train stably (Zuo et al. 2024, arXiv 2410.05355); ``"weighted"`` with weights, which
            both directions share, as Jamba does (arXiv 2403.19887).
        bcdt_norm_eps: added to the mean of squares in those norms.
        bidirectional: a second convolution and scan, with weights of their own, read every sequence from its end; the
            projections in and out and the gate are shared, and the two outputs are added before the last of them
            (Vision Mamba, Zhu et al. 2024, arXiv 2401.09417, algorithm 1). Then it is not causal and has no state.

    The names of its weights are those of the published checkpoints; the second direction has Vision Mamba's. A (as
    ``A_log``), D and Δ's bias stay float32.
    """

    crosses_in_ops = True
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
        bcdt_norm: bool | Literal["weighted"] = False,
        bcdt_norm_eps: float = 1e-6,
        bidirectional: bool = False,
    ):
        super().__init__(d_model)
        self.look_ahead(bidirectional)
        self.check_at_least(1, d_state=d_state, d_conv=d_conv)
        self.d_inner = round(expand * d_model)
        if self.d_inner < 1 or self.d_inner != expand * d_model:
            raise ValueError(f"Mamba: `expand` · d_model must be a whole number of channels; got {expand} · {d_model}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba: 0 < `dt_min` <= `dt_max` must hold; got {dt_min} and {dt_max}")
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.check_at_least(1, dt_rank=self.dt_rank)
        if bcdt_norm_eps < 0:
            raise ValueError(f"Mamba: `bcdt_norm_eps` must not be negative; got {bcdt_norm_eps}")
        self.d_state, self.d_conv = d_state, d_conv
        self.bcdt_norm, self.bcdt_norm_eps = bcdt_norm, bcdt_norm_eps

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias)
        self.dt_layernorm: nn.Module | None = None
        self.b_layernorm: nn.Module | None = None
        self.c_layernorm: nn.Module | None = None
        if bcdt_norm == "weighted":
            self.dt_layernorm = RMSNorm(self.dt_rank, eps=bcdt_norm_eps)
            self.b_layernorm = RMSNorm(d_state, eps=bcdt_norm_eps)
            self.c_layernorm = RMSNorm(d_state, eps=bcdt_norm_eps)
        self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D = self._new_weights(conv_bias)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)
        self.float32_parameters = ("A_log", "D", "dt_proj.bias")
        if bidirectional:
            self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b = self._new_weights(conv_bias)
            self.float32_parameters += ("A_b_log", "D_b", "dt_proj_b.bias")
        self.no_weight_decay = self.float32_parameters

        bound = dt_scale * self.dt_rank**-0.5
        with torch.no_grad():
            for dt_proj in (self.dt_proj, self.dt_proj_b) if bidirectional else (self.dt_proj,):
                if dt_init == "constant":
                    dt_proj.weight.fill_(bound)
                else:
                    dt_proj.weight.uniform_(-bound, bound)
                dt_bias = inverse_softplus_of_log_uniform(self.d_inner, dt_min, dt_max, dt_init_floor)
                dt_proj.bias = nn.Parameter(dt_bias)  # a new one: the default dtype may be too narrow

    def _new_weights(self, conv_bias: bool) -> tuple[nn.Conv1d, nn.Linear, WideBiasLinear, nn.Parameter, nn.Parameter]:
        """Fresh weights in the order of :class:`Selective`; those of Δ are set afterwards."""
        d, n, r, wide = self.d_inner, self.d_state, self.dt_rank, wide_dtype()

        def A_log() -> Tensor:
            """S4D-real: A = -1, …, -n."""
            return torch.arange(1, n + 1, dtype=wide).log().repeat(d, 1)

        return (
            # Holds the weight and bias under their published names; the op does the convolution.
            nn.Conv1d(d, d, self.d_conv, groups=d, bias=conv_bias),
            Linear(d, r + 2 * n, bias=False),
            WideBiasLinear(r, d),
            nn.Parameter(starting((d, n), wide, A_log)),
            nn.Parameter(torch.ones(d, dtype=wide)),
        )

    def initial_state(self, batch_size: int, max_length: int | None = None) -> MambaState:
        self.check_has_state()
        new = self.like(wide=True).new_zeros
        return MambaState(
            conv=new(batch_size, self.d_conv - 1, self.d_inner), ssm=new(batch_size, self.d_inner, self.d_state)
        )

    def mixing_flops(self, context: int) -> float:
        """Six a state and channel for the scan (decay, input, output), two a tap for the convolution; each way."""
        return self.d_inner * (6 * self.d_state + 2 * self.d_conv) * (2 if self.bidirectional else 1)

    def mix(self, x: Tensor, state: MambaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, MambaState | None]:
        one = state is not None and x.shape[1] == 1 and cu_seqlens is None
        if one and self._may_step(x):
            return self._step(x, cast(MambaState, state)), state
        xz = self.in_proj(x)  # (b l 2d)
        weights = Selective(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        if self.bidirectional:
            return self.out_proj(self._both_ways(weights, xz, cu_seqlens)), None
        if one and in_one_call(x, self._modules["conv1d"]):
            return self.out_proj(self._ssm_step(weights, xz[:, 0], cast(MambaState, state))[:, None]), state
        y, after = self._selective_ssm(weights, xz, state, cu_seqlens)  # (b l d)
        return self.out_proj(y), None if state is None else after

    def _selective_ssm(
        self, w: Selective, xz: Tensor, state: MambaState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        """Convolution and gated scan: x beside z (b l 2d) → y · silu(z) (b l d), and the state after."""
        conv, ssm = (None, None) if state is None else (state.conv, state.ssm)
        x, z = xz.chunk(2, dim=-1)  # (b l d) each
        x, conv = convolve(w.conv1d, x, self.d_conv, "silu", conv, cu_seqlens)  # (b l d)
        delta, delta_bias, B, C = self._selected(w, x)
        A = -finite_exp(w.A_log)  # (d n)
        y, ssm = selective_scan(
            x,
            delta,
            A,
            B,
            C,
            w.D,
            z,
            delta_bias,
            delta_softplus=True,
            initial_state=ssm,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return y, MambaState(conv, ssm)

    def _selected(self, w: Selective, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What is made of the tokens (… d): Δ (… d) without its bias, the bias (d), B and C (… n)."""
        dt, B, C = w.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)  # (… r), (… n), (… n)
        if self.bcdt_norm:
            norms = (self.dt_layernorm, self.b_layernorm, self.c_layernorm)
            dt, B, C = (self._normed(t, norm) for t, norm in zip((dt, B, C), norms, strict=True))
        if is_plain(w.dt_proj):  # the scan adds the bias, in float32
            assert isinstance(w.dt_proj, nn.Linear)
            return linear(dt, w.dt_proj.weight), w.dt_proj.bias, B, C
        return w.dt_proj(dt).to(x.dtype), None, B, C

    def _ssm_step(self, w: Selective, xz: Tensor, state: MambaState) -> Tensor:
        """One token of :meth:`_selective_ssm`, where a map is called: (b 2d) → (b d); updates the state in place."""
        x, z = xz.chunk(2, dim=-1)
        conv1d = cast(nn.Conv1d, w.conv1d)
        x = causal_conv1d_step(state.conv, x, conv1d.weight.squeeze(1), conv1d.bias, "silu")
        delta, bias, B, C = self._selected(w, x)
        return selective_scan_step(state.ssm, x, delta, -finite_exp(w.A_log), B, C, w.D, z, bias, True)

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is not None:
            return cast(Tensor, widened(norm(x), x))
        return cast(Tensor, rms_norm(x, x.new_ones(x.shape[-1]), eps=self.bcdt_norm_eps))

    # The second direction.

    def _both_ways(self, weights: Selective, xz: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The sum of both directions: x beside z (b l 2d) → (b l d)."""
        reverse = Selective(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        return both_ways(
            lambda xz: self._selective_ssm(weights, xz, None, cu_seqlens)[0],
            lambda xz: self._selective_ssm(reverse, xz, None, cu_seqlens)[0],
            xz,
            cu_seqlens,
        )

    # One token in one call, which gives the same as all of the above.

    def _may_step(self, x: Tensor) -> bool:
        """Whether :func:`ssmkernels.mamba_step` may compute the whole layer."""
        m = self._modules
        maps = (m[name] for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"))
        return self.bcdt_norm != "weighted" and in_one_call(x, *maps) and self.x_proj.bias is None

    def _step(self, x: Tensor, state: MambaState) -> Tensor:
        arguments, options = step_arguments(self, x[:, 0], state)
        return mamba_step(*arguments, **options)[:, None]

    def prepare_step(self, calls: Calls, x: Tensor, state: MambaState) -> Tensor | None:
        if self._may_step(x):
            arguments, options = step_arguments(self, x, state)
            return calls.op(mamba_step, *arguments, **options)
        return prepare_parts(self, calls, x, state)
