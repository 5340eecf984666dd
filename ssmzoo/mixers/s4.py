"""S4, the structured state space (Gu, Goel and Ré 2021, arXiv 2111.00396)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels import bilinear_dplr, discretize_dplr, dplr_kernel
from ssmkernels.ops.dplr_kernel.discretize import Structured, column, dense
from ssmzoo.lti.hippo import nplr
from ssmzoo.lti.layer import Continuous, S4Layer, Stepper, check_state_size
from ssmzoo.lti.recurrence import Dense
from ssmzoo.registry import register_mixer


@register_mixer("s4")
class S4(S4Layer):
    """Linear time-invariant state space, diagonal plus low rank as HiPPO is; then GELU and a gated linear unit.

    A = diag(Λ) - P P*, of rank 1, for ``init="legt"`` 2. Its training starts from HiPPO's matrix itself, but that the
    real part of Λ, which is 0 for "legt" and "fourier", starts at -1e-4.

    Args:
        d_model: width of input and output; each channel has a system of its own.
        d_state: size of each channel's state, as d_state / 2 conjugate pairs.
        init: HiPPO's matrix: ``"legs"`` (scaled Legendre), ``"legt"`` (Legendre over a window) or ``"fourier"``.
        discretization: ``"bilinear"``, or ``"zoh"``, which takes n times the work for one token.
        dt_min, dt_max: the step sizes Δ start log-uniform between them.
        dt_tie: one Δ a channel; otherwise one for each state of it, Δ ∘ (A h + B u).
        n_ssm: how many different A and B there are, dealt out to the channels in turn; one a channel if None.
        channels: kernels, and so outputs, of each channel; they share its state.
        bidirectional: adds a kernel that looks ahead; then it is not causal and has no state.
        gate: multiplies the activations, mapped to gate · (channels inside), by a linear map of the layer's input.
        bottleneck: d_model / bottleneck channels inside.
        activation: after the convolution and its skip.
        dropout: before the last linear map.
        rate: stretches Δ: the spacing of the inputs over that for which the layer is made, or was trained. The
            attribute of this name may change at any time, see :func:`ssmzoo.set_rate`.
        lr: learning rate of A (Λ and P), B and Δ, which get no weight decay: a number, or one for each of "A", "B",
            "C" and "dt". 0 keeps a weight as it is; None, or a name left out, leaves it to the optimiser.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: Literal["legs", "legt", "fourier"] = "legs",
        discretization: Literal["bilinear", "zoh"] = "bilinear",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        n_ssm: int | None = None,
        channels: int = 1,
        bidirectional: bool = False,
        gate: int | None = None,
        bottleneck: int | None = None,
        activation: Literal["gelu", "silu", "relu", "tanh", "none"] = "gelu",
        dropout: float = 0.0,
        rate: float = 1.0,
        lr: float | dict[str, Any] | None = 0.001,
    ):
        check_state_size("S4", d_state, pairs=True)
        start = nplr(init, d_state)
        super().__init__(
            d_model,
            A=start.Lambda.to(torch.complex64),
            B=start.B.to(torch.complex64),
            P=start.P.to(torch.complex64),
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_tie=dt_tie,
            n_ssm=n_ssm,
            channels=channels,
            bidirectional=bidirectional,
            gate=gate,
            bottleneck=bottleneck,
            activation=activation,
            dropout=dropout,
            rate=rate,
            lr=lr,
        )

    def kernel(self, system: Continuous, C: Tensor, length: int) -> Tensor:
        A, B, dt, P, Q = system
        return dplr_kernel(A, P, Q, B, C, dt, length, discretization=self.discretization)

    def discrete(self, system: Continuous) -> Dense:
        A, B, dt, P, Q = system
        if self.discretization == "bilinear":
            discrete = bilinear_dplr(A, P, Q, B, dt)
            A_bar, B_bar = dense(discrete.diagonal, discrete.left, discrete.right), column(discrete.input)
        else:
            A_bar, B_bar = discretize_dplr(A, P, Q, B, dt.double(), discretization=self.discretization)
        return Dense(A_bar, B_bar.to(dt.dtype))

    def stepper(self, system: Continuous) -> Stepper:
        A, B, dt, P, Q = system
        if self.discretization == "bilinear":
            return Structured(*(x.to(A.dtype) for x in bilinear_dplr(A, P, Q, B, dt)))
        exact = self.discrete(system)
        return Dense(exact.A.to(dt.dtype), exact.B)
