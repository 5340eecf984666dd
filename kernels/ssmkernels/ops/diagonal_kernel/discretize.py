"""From continuous to discrete time, for the convolution kernel and the recurrent step alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.names import unknown
from ssmkernels.core.validate import COMPLEX, REAL, check_dtypes, check_length, check_shapes, precision

DISCRETIZATIONS = ("bilinear", "dss", "zoh")

# ε in the reciprocal of DSS, as published.
EPSILON = 1e-7


def discretize_diagonal(
    A: Tensor, B: Tensor, dt: Tensor, *, discretization: str = "zoh", length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Turns h' = A h + B u with diagonal A into h_t = Ā h_{t-1} + B̄ u_t, at a step size per channel.

    S4D (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893, section 3.1) and DSS (Gupta, Gu and Berant 2022, arXiv
    2203.14343, Proposition 1 and section 3.3)::

        zoh       Ā = exp(ΔA)                     B̄ = (Ā - 1)/A · B,  which is Δ B at A = 0
        bilinear  Ā = (1 + ΔA/2) / (1 - ΔA/2)     B̄ = Δ / (1 - ΔA/2) · B
        dss       Ā = exp(ΔA)                     B̄ = B/A / Σ_{s<l} Ā^s  =  (Ā - 1) · 1/(A (Ā^l - 1)) · B

    With dss the kernel of length l, C B̄ Ā^t, is C B/A times the softmax over time of ΔA t: its B̄ depends on l, and the
    recurrence gives that kernel's results for the first l steps. The reciprocal of x = A (Ā^l - 1) is taken as
    x* / (|x|² + ε) with ε = 1e-7, since x is 0 where A is and wherever ΔA l is a multiple of 2πi.

    Where Re A > 0 the softmax would overflow. There the same fraction is reduced by Ā^l: with a = 1/Ā, which decays, ::

        dss       B̄ = a^{l-1} (a - 1) · 1/(A (a^l - 1)) · B

    and ε stands beside the |x|² of this x. Re A = 0 counts as decay. Nothing is cut off from the gradient, unlike in
    the published programs, which hold the largest exponent fixed in the softmax but not in its sum.

    Args:
        A, B: ``(d, n)``, real or complex; B complex only where A is.
        dt: the step size Δ, ``(d)``, real.
        discretization: ``"zoh"`` (zero-order hold), ``"bilinear"`` or ``"dss"``.
        length: the number of taps l of the kernel that the recurrence is to have. Only ``"dss"`` reads it.

    Returns:
        Ā and B̄, ``(d, n)``, complex where A is, in float32 (float64 where any input is).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, an unknown
            discretisation, or no length where there must be one.
    """
    op = "discretize_diagonal"
    check_shapes(op, {"A": (A, "d n"), "B": (B, "d n"), "dt": (dt, "d")}, ("A", "B", "dt"))
    check_diagonal(op, A, {"B": B}, dt, discretization)
    if length is not None or discretization == "dss":
        check_length(op, length)
    wide = precision(A, B, dt)
    A, B = (widen(x, wide) for x in (A, B))
    dt = dt.to(wide)
    if discretization == "dss":
        assert length is not None
        _, gain, grows = softmax_modes(A, dt, length)
        last = torch.exp(max(length - 1, 0) * dt[:, None] * torch.where(grows, -A, 0))
        return torch.exp(dt[:, None] * A), gain * last * B
    dt = dt[:, None]  # (d 1)
    if discretization == "zoh":
        return torch.exp(dt * A), _input_gain(A, dt) * B
    halfway = 1 - dt * A / 2
    return (1 + dt * A / 2) / halfway, dt / halfway * B


def softmax_modes(A: Tensor, dt: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of the softmax of DSS that neither overflow nor vanish.

    Args:
        A, dt: ``(d, n)`` and ``(d)``, checked, in one precision.
        length: the number of taps.

    Returns:
        The ratio a ``(d, n)``, at most 1 in size; a gain ``(d, n)``; and where Re A > 0, ``(d, n)``. The kernel is
        the sum over n of C B times the gain and a^t, but a^{length-1-t} where Re A > 0.
    """
    grows = A.real > 0 if A.is_complex() else A > 0
    decaying, dt = torch.where(grows, -A, A), dt[:, None]
    x = A * decaying * _input_gain(decaying, length * dt)
    size = x.real.square() + x.imag.square() if x.is_complex() else x.square()
    gain = decaying * _input_gain(decaying, dt) * x.conj_physical() / (size + EPSILON)
    return torch.exp(dt * decaying), gain, grows


def check_diagonal(op: str, A: Tensor, maps: dict[str, Tensor], dt: Tensor, discretization: str) -> None:
    """The rules that shapes alone do not tell.

    Raises:
        TypeError, ValueError: a complex map beside a real A, a complex Δ, an integer, or an unknown
            discretisation.
    """
    check_dtypes(op, {"A": A}, (*REAL, *COMPLEX))
    check_dtypes(op, maps, (*REAL, *COMPLEX) if A.is_complex() else REAL)
    check_dtypes(op, {"dt": dt}, REAL)
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"{op}: " + unknown("discretization", discretization, DISCRETIZATIONS))


def widen(x: Tensor, wide: torch.dtype) -> Tensor:
    """x in the precision ``wide``, complex if it was."""
    return x.to(torch.promote_types(x.dtype, wide))


def _input_gain(A: Tensor, dt: Tensor) -> Tensor:
    """(exp(ΔA) - 1)/A.

    Near 0 by its power series Δ Σ z^k/(k+1)! in z = ΔA: the quotient loses digits there, and its derivative
    twice as many. Sixteen terms leave less than float64's rounding for |z| < 1/2.
    """
    z = dt * A
    small = z.abs() < 0.5
    near = torch.where(small, z, 0)  # here and below: neither branch sees what would spoil its gradient
    one = series = torch.ones_like(z)
    for k in range(16, 1, -1):
        series = torch.addcmul(one, near, series, value=1 / k)
    quotient = (torch.exp(torch.where(small, 1, z)) - 1) / torch.where(small, 1, A)
    return torch.where(small, dt * series, quotient)
