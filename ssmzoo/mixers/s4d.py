"""S4D, the diagonal structured state space (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels import diagonal_kernel, discretize_diagonal
from ssmzoo.lti.hippo import diagonal, nplr
from ssmzoo.lti.layer import Continuous, S4Layer, check_state_size
from ssmzoo.lti.recurrence import Diagonal, DiagonalStep
from ssmzoo.registry import register_mixer


@register_mixer("s4d")
class S4D(S4Layer):
    """Diagonal linear time-invariant state space, a long convolution by FFT; then GELU and a gated linear unit.

    Args:
        d_model: width of input and output; each channel has a system of its own.
        d_state: size of each channel's state, as d_state / 2 conjugate pairs (d_state numbers for ``init="real"``).
        init: the diagonal of A (n = 0, 1, ...): ``"lin"`` -1/2 + iπn, ``"inv"`` -1/2 + i (N/π)(N/(2n+1) - 1) with
            N = d_state, ``"legs"`` the eigenvalues of the normal part of HiPPO-LegS, ``"real"`` -(n + 1). B starts at
            1; for "legs" at half of HiPPO's, in the basis of those eigenvectors (arXiv 2206.11893, theorem 3).
        discretization: ``"zoh"``, ``"bilinear"`` or ``"dss"`` (softmax, arXiv 2203.14343), which has no state, as its
            kernel depends on the whole length.
        dt_min, dt_max: the step sizes Δ start log-uniform between them.
        dt_tie: one Δ a channel; otherwise one for each state of it.
        n_ssm: how many different A and B there are, dealt out to the channels in turn; one a channel if None.
        channels: kernels, and so outputs, of each channel; they share its state.
        bidirectional: adds a kernel that looks ahead; then it is not causal and has no state.
        gate: multiplies the activations, mapped to gate · (channels inside), by a linear map of the layer's input.
        bottleneck: d_model / bottleneck channels inside.
        activation: after the convolution and its skip.
        dropout: before the last linear map.
        rate: stretches Δ: the spacing of the inputs over that for which the layer is made, or was trained. The
            attribute of this name may change at any time, see :func:`ssmzoo.set_rate`.
        lr: learning rate of A, B and Δ, which get no weight decay: a number, or one for each of "A", "B", "C" and "dt".
            0 keeps a weight as it is; None, or a name left out, leaves it to the optimiser.
    """

    length_dependent = ("dss",)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: Literal["legs", "lin", "inv", "real"] = "legs",
        discretization: Literal["zoh", "bilinear", "dss"] = "zoh",
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
        check_state_size("S4D", d_state, pairs=init != "real")
        A = diagonal(init, d_state)
        super().__init__(
            d_model,
            A=A,
            B=nplr("legs", d_state).B.to(A.dtype) / 2 if init == "legs" else torch.ones_like(A),
            P=None,
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
        return diagonal_kernel(system.A, system.B, C, system.dt, length, discretization=self.discretization)

    def discrete(self, system: Continuous) -> Diagonal:
        A, B, dt, *_ = system
        A_bar, B_bar = discretize_diagonal(A, B, dt.double(), discretization=self.discretization)
        return Diagonal(A_bar, B_bar.to(B.dtype))

    def stepper(self, system: Continuous) -> DiagonalStep:
        return DiagonalStep.of(self.discrete(system))
