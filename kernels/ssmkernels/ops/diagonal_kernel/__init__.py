"""The convolution kernel of a diagonal state-space model: S4D (Gu et al. 2022, arXiv 2206.11893)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.validate import check_length
from ssmkernels.ops.diagonal_kernel.discretize import check_diagonal, discretize_diagonal

__all__ = ["diagonal_kernel", "discretize_diagonal"]


def _check(name: str, _: dict[str, int], *, B: Tensor, C: Tensor, length: int, **others: Any) -> None:
    check_diagonal(name, maps={"B": B, "C": C}, **others)
    check_length(name, length)


@op(
    shapes="A B C: d n; dt: d",
    returns="K: d length: sums",
    own="A B C dt",
    check=_check,
)
def diagonal_kernel(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    *,
    discretization: str = "zoh",
    implementation: str | None = None,
) -> Tensor:
    """The response of h_t = Ā h_{t-1} + B̄ u_t, y_t = Σ_n C h_t to an impulse at time 0::

        K_t = Σ_n C_n B̄_n Ā_n^t,   twice the real part where A is complex

    With complex A an entry stands for itself and its conjugate. :func:`discretize_diagonal` gives Ā and B̄; with
    ``"dss"`` they depend on the length, and K_t = Σ_n C_n B_n/A_n softmax_t(Δ A_n t) over the times 0 to length - 1.

    Sizes: d channels, n state size (of conjugate pairs where A is complex).

    Args:
        A, B, C: ``(d, n)``, real or complex; B and C complex only where A is. The real part of A should be
            negative, but for ``"dss"``, whose kernel is bounded whatever its sign.
        dt: the step size Δ, ``(d)``, real.
        length: the number of taps.
        discretization: ``"zoh"`` (zero-order hold), ``"bilinear"`` or ``"dss"``.

    Returns:
        K ``(d, length)``, float32 (float64 where any input is).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or an unknown
            discretisation.
    """
