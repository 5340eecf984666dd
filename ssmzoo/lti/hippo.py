"""HiPPO's matrices, exactly, and the diagonal and low-rank forms that S4 and S4D start from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.names import unknown

HIPPO = ("legs", "legt", "fourier")
DIAGONALS = ("legs", "lin", "inv", "real")


class NPLR(NamedTuple):
    """A = V (diag(Λ) - P P*) V*, B = V B̃ in a unitary basis, of which one of each conjugate pair of columns is kept.

    With ``v`` the kept half of V, a matrix V M V* of the whole basis is 2 Re(v M v*) for diagonal M, and V P P* V* is
    p pᵀ with p = 2 Re(v P). The phases of the basis are such that B̃ is real and not negative.
    """

    Lambda: Tensor  # (n/2), complex128, imaginary parts rising from 0 on
    P: Tensor  # (r n/2), complex128
    B: Tensor  # (n/2), complex128
    V: Tensor  # (n n/2), complex128


def hippo(init: str, n: int) -> tuple[Tensor, Tensor]:
    """The dense continuous system h' = A h + B u, ``(n n)`` and ``(n)`` in float64.

    - ``"legs"``: Legendre polynomials, exponentially warped (HiPPO, arXiv 2008.07669, theorem 2; as a time-invariant
      system, arXiv 2206.12037): A_ij = -√(2i+1) √(2j+1) below the diagonal, -(i+1) on it, B_i = √(2i+1).
    - ``"legt"``: Legendre polynomials over a sliding window (arXiv 2008.07669, theorem 1), whose width is 2:
      A_ij = -½ √(2i+1) √(2j+1), times (-1)^(i-j) above the diagonal; B_i = ½ √(2i+1).
    - ``"fourier"``: the truncated Fourier basis over such a window, n even (FouT, arXiv 2206.12037): rotations at
      the frequencies π k between cosine 2k and sine 2k+1, minus B Bᵀ; B is 1 for the mean, √2 for the other cosines,
      0 for sines.
    """
    if init not in HIPPO:
        raise ValueError("S4: " + unknown("init", init, HIPPO))
    index = torch.arange(n, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * index + 1)
    if init == "legs":
        return -(torch.tril(root[:, None] * root, -1) + torch.diag(index + 1)), root
    if init == "legt":
        sign = 1 - 2 * ((index[:, None] - index) % 2)
        return -root[:, None] * root / 2 * torch.where(index[:, None] < index, sign, 1), root / 2
    B = math.sqrt(2) * (1 - index % 2)
    B[0] = 1
    rotation = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    cosines = torch.arange(0, n, 2, device="cpu")
    rotation[cosines + 1, cosines] = math.pi * index[: n // 2]
    return rotation - rotation.mT - B[:, None] * B, B


def low_rank(init: str, n: int) -> Tensor:
    """P, ``(r n)`` in float64, for which A + Pᵀ P is normal, with A of :func:`hippo` (S4, arXiv 2111.00396, theorem 1).

    The rank is 1 for "legs" and "fourier", 2 for "legt": its even and its odd entries.
    """
    index = torch.arange(n, dtype=torch.float64, device="cpu")
    if init == "legs":
        return torch.sqrt(index + 0.5)[None]
    if init == "legt":
        P = torch.sqrt(index + 0.5)
        return torch.stack([torch.where(index % 2 == 1, P, 0), torch.where(index % 2 == 0, P, 0)])
    return hippo(init, n)[1][None]


def nplr(init: str, n: int) -> NPLR:
    """:func:`hippo` as a normal matrix minus a low rank, the normal one diagonal; n must be even."""
    A, B = hippo(init, n)
    P = low_rank(init, n)
    normal = A + P.mT @ P  # c I + S with S skew-symmetric: eigenvalues c ± iω
    if init == "fourier":  # S is of blocks on the diagonal; of its double eigenvalue 0 eigh would give any basis
        omega = math.pi * torch.arange(n // 2, dtype=torch.float64, device="cpu")
        V = torch.zeros(n, n // 2, dtype=torch.complex128, device="cpu")
        pair = torch.arange(n // 2, device="cpu")
        V.real[2 * pair, pair] = math.sqrt(0.5)
        V.imag[2 * pair + 1, pair] = -math.sqrt(0.5)
    else:
        omega, V = torch.linalg.eigh(-0.5j * (normal - normal.mT))
        omega, V = omega[n // 2 :], V[:, n // 2 :]
    gain = V.mH @ B.to(V.dtype)
    V = V * torch.where(gain == 0, 1, torch.sgn(gain))
    constant = torch.full_like(omega, -0.5 if init == "legs" else 0.0)
    return NPLR(torch.complex(constant, omega), P.to(V.dtype) @ V.conj(), V.mH @ B.to(V.dtype), V)


def diagonal(init: str, d_state: int) -> Tensor:
    """The diagonal of A, ``(d_state / 2)`` complex64 in the upper half plane, or ``(d_state)`` float32 if "real".

    S4D (arXiv 2206.11893), section 4: S4D-LegS, S4D-Inv (equation 8), S4D-Lin (equation 9), S4D-Real.
    """
    if init not in DIAGONALS:
        raise ValueError("S4D: " + unknown("init", init, DIAGONALS))
    if init == "real":
        return -(torch.arange(d_state, dtype=torch.float32, device="cpu") + 1)
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    if init == "lin":
        imaginary = math.pi * n
    elif init == "inv":
        imaginary = d_state / math.pi * (d_state / (2 * n + 1) - 1)
    else:
        imaginary = nplr("legs", d_state).Lambda.imag
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary).to(torch.complex64)
