"""S4, the structured state space (Gu, Goel and Ré 2021, arXiv 2111.00396)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels import bilinear_dplr, discretize_dplr, dplr_kernel
from ssmkernels.ops.dplr_kernel.discretize import Structured, column, dense
from ssmzoo.lti.hippo import nplr
from ssmzoo.lti.layer import Continuous, S4Layer, Stepper
from ssmzoo.lti.options import LTIOptions
from ssmzoo.lti.recurrence import Dense
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class S4Options(LTIOptions):
    """Those of :class:`~ssmzoo.lti.options.LTIOptions`, two of which are special to S4.

    Attributes:
        init: HiPPO's matrix: ``"legs"`` (scaled Legendre), ``"legt"`` (Legendre over a window) or ``"fourier"``.
        discretization: ``"bilinear"``, or ``"zoh"``, which takes n times the work for one token.
    """

    init: Literal["legs", "legt", "fourier"] = "legs"
    discretization: Literal["bilinear", "zoh"] = "bilinear"


@register_mixer("s4")
class S4(S4Layer):
    """Linear time-invariant state space, diagonal plus low rank as HiPPO is; then GELU and a gated linear unit.

    A = diag(Λ) - P P*, of rank 1, for ``init="legt"`` 2. Its training starts from HiPPO's matrix itself, but that the
    real part of Λ, which is 0 for "legt" and "fourier", starts at -1e-4.

    Args:
        d_model: width of input and output; each channel has a system of its own.
        options: those of :class:`S4Options`.
    """

    options_class = S4Options

    def __init__(self, d_model: int, **options: Any):
        o = S4Options(**options)
        o.check_state_size("S4", pairs=True)
        A, P, B, _ = (x.to(torch.complex64) for x in nplr(o.init, o.d_state))
        super().__init__(d_model, o, A=A, B=B, P=P)

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
