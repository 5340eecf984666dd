"""From continuous to discrete time, for the convolution kernel and the recurrent step alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.dispatch import unknown
from ssmkernels.validate import COMPLEX, REAL, check_dtypes, check_shapes, precision

DISCRETIZATIONS = ("bilinear", "zoh")


def discretize_diagonal(A: Tensor, B: Tensor, dt: Tensor, *, discretization: str = "zoh") -> tuple[Tensor, Tensor]:
    """Turns h' = A h + B u with diagonal A into h_t = Ā h_{t-1} + B̄ u_t, at a step size per channel.

    S4D (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893, section 3.1)::

        zoh       Ā = exp(ΔA)                     B̄ = (Ā - 1)/A · B,  which is Δ B at A = 0
        bilinear  Ā = (1 + ΔA/2) / (1 - ΔA/2)     B̄ = Δ / (1 - ΔA/2) · B

    Args:
        A, B: ``(d, n)``, real or complex; B complex only where A is.
        dt: the step size Δ, ``(d)``, real.
        discretization: ``"zoh"`` (zero-order hold) or ``"bilinear"``.

    Returns:
        Ā and B̄, ``(d, n)``, complex where A is, in float32 (float64 where any input is).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or an unknown
            discretisation.
    """
    check_shapes(
        "discretize_diagonal",
        {"A": (A, "d n"), "B": (B, "d n"), "dt": (dt, "d")},
        ("A", "B", "dt"),
    )
    check_diagonal("discretize_diagonal", A, {"B": B}, dt, discretization)
    wide = precision(A, B, dt)
    A, B = (widen(x, wide) for x in (A, B))
    dt = dt.to(wide)[:, None]  # (d 1)
    if discretization == "zoh":
        return torch.exp(dt * A), _input_gain(A, dt) * B
    halfway = 1 - dt * A / 2
    return (1 + dt * A / 2) / halfway, dt / halfway * B


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
    series = torch.ones_like(z)
    for k in range(16, 1, -1):
        series = 1 + near / k * series
    quotient = (torch.exp(torch.where(small, 1, z)) - 1) / torch.where(small, 1, A)
    return torch.where(small, dt * series, quotient)
