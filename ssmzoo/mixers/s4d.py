"""S4D, the diagonal structured state space (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels import diagonal_kernel, discretize_diagonal
from ssmzoo.lti.hippo import diagonal, nplr
from ssmzoo.lti.layer import Continuous, S4Layer
from ssmzoo.lti.options import LTIOptions
from ssmzoo.lti.recurrence import Diagonal, DiagonalStep
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class S4DOptions(LTIOptions):
    """Those of :class:`~ssmzoo.lti.options.LTIOptions`, two of which are special to S4D.

    Attributes:
        init: the diagonal of A (n = 0, 1, ...): ``"lin"`` -1/2 + iπn, ``"inv"`` -1/2 + i (N/π)(N/(2n+1) - 1) with
            N = d_state, ``"legs"`` the eigenvalues of the normal part of HiPPO-LegS, ``"real"`` -(n + 1). B starts at
            1; for "legs" at half of HiPPO's, in the basis of those eigenvectors (arXiv 2206.11893, theorem 3).
        discretization: ``"zoh"``, ``"bilinear"`` or ``"dss"`` (softmax, arXiv 2203.14343), which has no state, as its
            kernel depends on the whole length.
    """

    init: Literal["legs", "lin", "inv", "real"] = "legs"
    discretization: Literal["zoh", "bilinear", "dss"] = "zoh"


@register_mixer("s4d")
class S4D(S4Layer):
    """Diagonal linear time-invariant state space, a long convolution by FFT; then GELU and a gated linear unit.

    Args:
        d_model: width of input and output; each channel has a system of its own.
        options: those of :class:`S4DOptions`.
    """

    options_class = S4DOptions
    length_dependent = ("dss",)

    def __init__(self, d_model: int, **options: Any):
        o = S4DOptions(**options)
        o.check_state_size("S4D", pairs=o.init != "real")
        A = diagonal(o.init, o.d_state)
        B = nplr("legs", o.d_state).B.to(A.dtype) / 2 if o.init == "legs" else torch.ones_like(A)
        super().__init__(d_model, o, A=A, B=B, P=None)

    def kernel(self, system: Continuous, C: Tensor, length: int) -> Tensor:
        return diagonal_kernel(system.A, system.B, C, system.dt, length, discretization=self.discretization)

    def discrete(self, system: Continuous) -> Diagonal:
        A, B, dt, *_ = system
        A_bar, B_bar = discretize_diagonal(A, B, dt.double(), discretization=self.discretization)
        return Diagonal(A_bar, B_bar.to(B.dtype))

    def stepper(self, system: Continuous) -> DiagonalStep:
        return DiagonalStep.of(self.discrete(system))
