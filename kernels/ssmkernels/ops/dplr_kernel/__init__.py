"""The convolution kernel of a diagonal plus low-rank state-space model: S4 (Gu et al. 2022, arXiv 2111.00396)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.validate import check_length
from ssmkernels.ops.dplr_kernel.discretize import (
    SHAPES,
    bilinear_dplr,
    bilinear_step,
    check_system,
    discretize_dplr,
    ranked,
)

__all__ = ["bilinear_dplr", "bilinear_step", "discretize_dplr", "dplr_kernel"]


def _check(name: str, _: dict[str, int], *, length: int, **system: Any) -> None:
    check_system(name, **system)
    check_length(name, length)


def _lower(P: Tensor, Q: Tensor, **others: Any) -> dict[str, Any]:
    return {**others, "P": ranked(P), "Q": ranked(Q)}


@op(
    shapes="\n".join(f"{name}: {shape}" for name, shape in SHAPES.items()),
    returns="K: d length: sums",
    own=" ".join(SHAPES),
    check=_check,
    lower=_lower,
    implementations=("triton", "cpu", "tiled", "cauchy", "reference"),
)
def dplr_kernel(
    A: Tensor,
    P: Tensor,
    Q: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    *,
    discretization: str = "bilinear",
    implementation: str | None = None,
) -> Tensor:
    """The response of h_t = Ā h_{t-1} + B̄ u_t, y_t = C h_t to an impulse at time 0::

        K_t = C Ā^t B̄,   where the continuous matrix is diag(A) - Σ_r P_r Q_r*

    With complex A an entry stands for itself and its conjugate. On the halves h ∈ C^n that are kept, the matrix is
    then A h - Σ_r P_r 2 Re(Q_r* h), and K_t = 2 Re(C Ā^t B̄); C is not conjugated. :func:`discretize_dplr` gives Ā and
    B̄, :func:`bilinear_step` one step of the recurrence.

    Sizes: d channels, n state size (of conjugate pairs where A is complex), r rank.

    Args:
        A, B, C: ``(d, n)``, real or complex.
        P, Q: ``(d, n)``, or ``(d, r, n)``. As B and C, complex only where A is. The eigenvalues of the continuous
            matrix should have negative real parts.
        dt: the step size Δ, ``(d)``, real.
        length: the number of taps.
        discretization: ``"bilinear"`` or ``"zoh"`` (zero-order hold).

    Returns:
        K ``(d, length)``, float32 (float64 where any input is).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or an unknown
            discretisation.
    """
