"""The convolution kernel of a diagonal state-space model: S4D (Gu et al. 2022, arXiv 2206.11893)."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.dispatch import Op
from ssmkernels.core.validate import check_length, check_shapes, precision
from ssmkernels.ops.diagonal_kernel.discretize import check_diagonal, discretize_diagonal

__all__ = ["diagonal_kernel", "discretize_diagonal"]


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
        implementation: force one by name; the fastest that can run this call if None.

    Returns:
        K ``(d, length)``, float32 (float64 where any input is).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or an unknown
            discretisation.
    """
    check_shapes(
        "diagonal_kernel",
        {"A": (A, "d n"), "B": (B, "d n"), "C": (C, "d n"), "dt": (dt, "d")},
        ("A", "B", "C", "dt"),
    )
    check_diagonal("diagonal_kernel", A, {"B": B, "C": C}, dt, discretization)
    check_length("diagonal_kernel", length)
    return _KERNEL(implementation, A=A, B=B, C=C, dt=dt, length=length, discretization=discretization)


def _fake(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str) -> Tensor:
    return dt.new_empty((A.shape[0], length), dtype=precision(A, B, C, dt))


_KERNEL = Op("diagonal_kernel", __name__, ("triton", "cpu", "tiled", "reference"), fake=_fake)
