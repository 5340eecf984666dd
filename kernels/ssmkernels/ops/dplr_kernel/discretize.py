"""From continuous to discrete time: as a dense matrix for any rule, and as diagonal plus low rank for the bilinear one.

Complex input stands for conjugate pairs, of which only one half h (n) is kept. The matrix then acts on real numbers
only: with h laid out as [Re h, Im h] it is a real matrix of N = 2n rows::

    A h = Λ h - Σ_r P_r 2 Re(Q_r* h)      →     [Re Λ  -Im Λ]       [Re P_r]
                                                [Im Λ   Re Λ] - Σ_r [Im P_r] 2 [Re Q_r  Im Q_r]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.names import unknown
from ssmkernels.core.validate import COMPLEX, REAL, check_dtypes, check_shapes, precision

DISCRETIZATIONS = ("bilinear", "zoh")

SHAPES = {"A": "d n", "P": "d n | d r n", "Q": "d n | d r n", "B": "d n", "C": "d n", "dt": "d"}


def discretize_dplr(
    A: Tensor, P: Tensor, Q: Tensor, B: Tensor, dt: Tensor, *, discretization: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Turns h' = (diag(A) - Σ_r P_r Q_r*) h + B u into h_t = Ā h_{t-1} + B̄ u_t, with a dense Ā for each channel.

    With F the continuous matrix (Gu, Goel and Ré 2022, arXiv 2111.00396, section 2.3)::

        bilinear  Ā = (I - ΔF/2)^-1 (I + ΔF/2)     B̄ = (I - ΔF/2)^-1 ΔB
        zoh       Ā = exp(ΔF)                      B̄ = F^-1 (Ā - I) B, which is ΔB at F = 0

    Args:
        A, B: ``(d, n)``, real or complex; complex entries stand for themselves and their conjugates.
        P, Q: ``(d, n)``, or ``(d, r, n)`` for a correction of rank r; complex only where A is, as is B.
        dt: the step size Δ, ``(d)``, real.
        discretization: ``"bilinear"`` or ``"zoh"`` (zero-order hold).

    Returns:
        (Ā ``(d, N, N)``, B̄ ``(d, N)``), real; computed in float64 and rounded to float32, unless an input is float64.
        N = n for real A; for complex A, N = 2n with a state h laid out as [Re h, Im h]: an output Σ 2 Re(C h) is then
        [2 Re C, -2 Im C] times that.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or an unknown discretisation.
    """
    check_dplr("discretize_dplr", discretization, A=A, P=P, Q=Q, B=B, dt=dt)
    wide = precision(A, P, Q, B, dt)
    if discretization == "bilinear":
        structured = bilinear_dplr(A, P, Q, B, dt)
        matrix = dense(structured.diagonal, structured.left, structured.right)
        return matrix.to(wide), column(structured.input).to(wide)
    A, P, Q, B = doubled(A, ranked(P), ranked(Q), B)
    dt = dt.double()
    system = dense(A, P, Q) * dt[:, None, None]  # (d N N)
    push = (column(B) * dt[:, None])[..., None]  # (d N 1)
    # exp of [[ΔF, ΔB], [0, 0]] is [[Ā, B̄], [0, 1]], whether F has an inverse or not
    both = torch.linalg.matrix_exp(torch.nn.functional.pad(torch.cat([system, push], dim=-1), (0, 0, 0, 1)))
    return both[:, :-1, :-1].to(wide), both[:, :-1, -1].to(wide)


class Structured(NamedTuple):
    """A discrete system whose matrix is diagonal plus low rank: Ā h = diagonal h - Σ_r left_r ⟨right_r, h⟩.

    The inner product is Re of twice Σ conj(right) h where these are complex, Σ right h where they are real.

    Attributes:
        diagonal: ``(d, n)``.
        left, right: ``(d, r, n)``.
        input: B̄, ``(d, n)``.
    """

    diagonal: Tensor
    left: Tensor
    right: Tensor
    input: Tensor

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        """h_t = Ā h_{t-1} + B̄ u_t, in O(n r).

        Args:
            h: the state, ``(b, d, n)``, complex where the system is.
            u: the input of this step, ``(b, d)``, real.

        Returns:
            the next state, a new tensor of h's dtype; the sums are those of the wider of h and the system.
        """
        inner = _inner(self.right, h[:, :, None])  # (b d r)
        moved = self.diagonal * h - (self.left * inner[..., None]).sum(2)
        return (moved + self.input * u[..., None]).to(h.dtype)


def bilinear_dplr(A: Tensor, P: Tensor, Q: Tensor, B: Tensor, dt: Tensor) -> Structured:
    """The bilinear rule of :func:`discretize_dplr` without a dense matrix: Ā is diagonal plus low rank as well.

    With M = 1 - ΔΛ/2, and ⟨Q, x⟩ for Q* x (2 Re of it where complex), Woodbury's identity gives (arXiv 2111.00396,
    appendix C.2, there for the recurrence)::

        (I - ΔF/2)^-1 = 1/M - Δ/2 P/M S ⟨Q/M̄, ·⟩,     S = (I + Δ/2 ⟨Q, P/M⟩)^-1, of r rows
        Ā = 2 (I - ΔF/2)^-1 - I

    Arguments as of :func:`discretize_dplr`. Differentiable.

    Returns:
        the system in float64 (complex128 where A is complex), on the same device.
    """
    check_dplr("bilinear_dplr", "bilinear", A=A, P=P, Q=Q, B=B, dt=dt)
    A, P, Q, B = doubled(A, ranked(P), ranked(Q), B)
    dt = dt.double()[:, None]  # (d 1)
    inverse = 1 / (1 - dt * A / 2)  # 1/M (d n)
    solved = P * inverse[:, None]  # P/M (d r n)
    right = Q * inverse.conj()[:, None]  # Q/M̄ (d r n)
    gram = _inner(Q[:, :, None], solved[:, None])  # ⟨Q, P/M⟩ (d r r)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    S = torch.linalg.inv(eye + dt[..., None] / 2 * gram)
    left = dt[..., None] * (S.mT.to(solved.dtype) @ solved)  # Δ P/M S
    pushed = inverse * B - (left * _inner(right, B[:, None])[..., None]).sum(1) / 2
    return Structured(1 + dt * A * inverse, left, right, dt * pushed)  # of 2/M - 1, which rounds more


def bilinear_step(h: Tensor, u: Tensor, A: Tensor, P: Tensor, Q: Tensor, B: Tensor, dt: Tensor) -> Tensor:
    """One step h_t = Ā h_{t-1} + B̄ u_t of the bilinear rule, exact and in O(n r): no dense matrix, no eigenvectors.

    For many steps take ``system = bilinear_dplr(A, P, Q, B, dt)`` once, and ``system.step(h, u)`` for each.

    Args:
        h: ``(b, d, n)``, complex where A is.
        u: ``(b, d)``, real.
        A, P, Q, B, dt: as of :func:`discretize_dplr`.

    Returns:
        h_t ``(b, d, n)``, a new tensor of h's dtype, computed in float64. The output is Σ C h_t, 2 Re of it if complex.
    """
    return bilinear_dplr(A, P, Q, B, dt).step(h, u)


def check_dplr(op: str, discretization: str, **system: Tensor) -> None:
    """Checks what every function here takes: A, P, Q, B, perhaps C, and dt, by name.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or an unknown discretisation.
    """
    check_shapes(op, {name: (value, SHAPES[name]) for name, value in system.items()}, tuple(system))
    check_system(op, discretization=discretization, **system)


def check_system(op: str, *, A: Tensor, P: Tensor, Q: Tensor, dt: Tensor, discretization: str, **maps: Tensor) -> None:
    """The rules of :func:`check_dplr` that letters for sizes do not tell."""
    if P.shape != Q.shape:
        raise ValueError(f"{op}: `Q` must have the shape of `P`, {tuple(P.shape)}; got {tuple(Q.shape)}")
    check_dtypes(op, {"A": A}, (*REAL, *COMPLEX))
    check_dtypes(op, {"P": P, "Q": Q, **maps}, (*REAL, *COMPLEX) if A.is_complex() else REAL)
    check_dtypes(op, {"dt": dt}, REAL)
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"{op}: " + unknown("discretization", discretization, DISCRETIZATIONS))


def doubled(A: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in double precision, and complex if A is."""
    dtype = torch.complex128 if A.is_complex() else torch.float64
    return tuple(x.to(dtype) for x in (A, *others))


def ranked(P: Tensor) -> Tensor:
    """P or Q as ``(d, r, n)``."""
    return P if P.ndim == 3 else P[:, None]


def dense(A: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """h ↦ A h - Σ_r P_r ⟨Q_r, h⟩ as a real matrix (d N N), from A (d n) and P, Q (d r n), all of one dtype."""
    matrix = torch.diag_embed(A)
    if A.is_complex():
        matrix = torch.cat(
            [torch.cat([matrix.real, -matrix.imag], dim=2), torch.cat([matrix.imag, matrix.real], dim=2)], dim=1
        )
    return matrix - column(P).mT @ functional(Q)


def column(x: Tensor) -> Tensor:
    """A state, or an input map, as real numbers: ``(..., n)`` → ``(..., N)``."""
    return torch.cat([x.real, x.imag], dim=-1) if x.is_complex() else x


def functional(Q: Tensor) -> Tensor:
    """The row that takes a state's real numbers to ⟨Q, h⟩: ``(..., n)`` → ``(..., N)``."""
    return torch.cat([2 * Q.real, 2 * Q.imag], dim=-1) if Q.is_complex() else Q


def output(C: Tensor, A: Tensor) -> Tensor:
    """The row that takes a state's real numbers to Σ C h, 2 Re of it where A is complex: ``(d, n)`` → ``(d, N)``."""
    return functional(C.to(torch.promote_types(C.dtype, A.dtype)).conj())


def _inner(Q: Tensor, h: Tensor) -> Tensor:
    """⟨Q, h⟩ over the last axis; real."""
    return 2 * (Q.conj() * h).sum(-1).real if Q.is_complex() else (Q * h).sum(-1)
