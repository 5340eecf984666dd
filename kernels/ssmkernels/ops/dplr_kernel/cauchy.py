"""S4's own algorithm (Gu, Goel and Ré 2022, arXiv 2111.00396, algorithm 1): Cauchy, Woodbury, inverse FFT.

With z^l = e^-1 at each of l points on a circle, the generating function of l taps is that of all time for another
output map, C̃ = C (I - Ā^l / e), and the bilinear rule turns it into the continuous system's resolvent::

    Σ_t K_t z^t = C̃ (I - z Ā)^-1 B̄ = Δ C̃ (1 - z - f F)^-1 B        f = Δ (1 + z)/2,  F = diag(Λ) - P Q*

Of a diagonal plus low-rank matrix that is Cauchy products and a matrix of r rows to invert (Woodbury)::

    R_n = 1/(1 - z - f Λ_n)        X·Y = Σ_n X_n R_n Y_n        C̃·B - f C̃·P (I + f Q*·P)^-1 Q*·B

where each sum is over both of a conjugate pair. An inverse FFT takes the values on the circle back to K.

The paper has z^l = 1: there C̃ is nearly 0, and the resolvent nearly infinite, for all that does not decay within l. It
also divides by 1 + z, which is 0 at the highest frequency. Here neither costs a digit. Frequencies go through in chunks
that the backward pass computes again: no (d n l) tensor is kept. All is in double precision, and the error is relative
to the largest tap: of taps far smaller than that, an FFT keeps fewer digits than the recurrence does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.recompute import recomputed
from ssmkernels.core.validate import precision
from ssmkernels.ops.dplr_kernel.discretize import discretize_dplr, doubled, functional, output

PRECISE = 256  # taps in float64
CHUNK = 2**20  # complex numbers that are worked on at a time


class Resolvents(NamedTuple):
    """Sums Σ_n pairs_kn / (one_less - half poles_n), (d k f), in complex128.

    Attributes:
        poles: ΔΛ ``(d N)``.
        pairs: ``(d k N)``.
        one_less, half: 1 - z and (1 + z)/2, ``(f)``.
    """

    poles: Tensor
    pairs: Tensor
    one_less: Tensor
    half: Tensor


Sums = Callable[[Resolvents], Tensor]


def unsupported(a: Any) -> str | None:
    if a.discretization != "bilinear":
        return "the resolvent of the continuous system is that of the bilinear rule"
    if a.A.shape[0] == 0:
        return "no channels"
    if a.length > PRECISE and precision(a.A, a.P, a.Q, a.B, a.C, a.dt) == torch.float64:
        return f"in float64 beyond {PRECISE} taps: its FFT rounds all taps alike, too much for small ones"
    return "no float64 on this device" if a.A.device.type == "mps" else None


def compute(a: Any) -> Tensor:
    held = a.A.shape[1] * (2 if a.A.is_complex() else 1)
    return around_the_circle(a, cauchy_sums, CHUNK // max(1, a.A.shape[0] * held))


def around_the_circle(a: Any, sums: Sums, step: int) -> Tensor:
    """The kernel, by ``step`` frequencies at a time, with Cauchy products by ``sums``."""
    wide, length = precision(a.A, a.P, a.Q, a.B, a.C, a.dt), a.length
    size = max(length, 1)
    A, P, Q, B, C = doubled(a.A, a.P, a.Q, a.B, a.C)
    dt = a.dt.double()
    A_bar, _ = discretize_dplr(A, P, Q, B, dt, discretization=a.discretization)
    row = output(C, A)  # (d N)
    row = row - _last(row, A_bar, size) / math.e
    poles, lefts, rights = _pairs(A, P, Q, B, row)
    frequencies = size // 2 + 1
    step = max(1, step)
    parts = []
    for first in range(0, frequencies, step):
        numbers = torch.arange(first, min(first + step, frequencies), device=A.device, dtype=torch.float64)
        angles = numbers * (-2 * math.pi / size)
        given = (poles, lefts, rights, dt, angles, -1 / size, sums)
        parts.append(recomputed(_transfer, *given))
    shrunk = torch.fft.irfft(torch.cat(parts, dim=1), n=size)  # K_t e^{-t/l}
    growth = torch.exp(torch.arange(length, device=A.device, dtype=torch.float64) / size)
    return (shrunk[:, :length] * growth).to(wide)


def _last(row: Tensor, A_bar: Tensor, length: int) -> Tensor:
    """C Ā^length, by squaring: (d N), (d N N) → (d N)."""
    last = row[:, None]
    for bit in range(length.bit_length()):
        if bit:
            A_bar = A_bar @ A_bar
        if length >> bit & 1:
            last = last @ A_bar
    return last[:, 0]


def _pairs(A: Tensor, P: Tensor, Q: Tensor, B: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Λ (d N), [C̃; Q*] (d 1+r N) and [B; P] (d 1+r N), complex, with the conjugates of complex A among the N."""
    lefts = torch.cat([row[:, None], functional(Q)], dim=1)
    rights = torch.cat([B[:, None], P], dim=1)
    if not A.is_complex():
        return A + 0j, lefts + 0j, rights + 0j
    re, im = lefts.chunk(2, dim=2)
    lefts = torch.complex(re, -im) / 2
    poles, lefts, rights = (torch.cat([x, x.conj()], dim=-1) for x in (A, lefts, rights))
    return poles, lefts, rights


def _transfer(
    poles: Tensor, lefts: Tensor, rights: Tensor, dt: Tensor, angles: Tensor, log_radius: float, sums: Sums
) -> Tensor:
    """The generating function (d f) at z = e^{log_radius + i angle}."""
    z = math.exp(log_radius) * torch.polar(torch.ones_like(angles), angles)
    small = math.expm1(log_radius) * torch.cos(angles) - 2 * torch.sin(angles / 2).square()  # Re z - 1, to all digits
    ranks = lefts.shape[1]
    pairs = (lefts[:, :, None] * rights[:, None]).flatten(1, 2)  # (d (1+r)(1+r) N)
    half = (1 + z) / 2
    products = sums(Resolvents(dt[:, None] * poles, pairs, -torch.complex(small, z.imag), half))
    products = products.unflatten(1, (ranks, ranks))  # (d 1+r 1+r f)
    f = dt[:, None] * half  # (d f)
    if ranks == 2:  # a division, where a library would set up an inverse for each frequency
        CB, CP, QB, QP = products.flatten(1, 2).unbind(1)
        return dt[:, None] * (CB - f * CP * QB / (1 + f * QP))
    products = products.movedim(3, 1)
    CB, CP = products[..., :1, :1], products[..., :1, 1:]
    QB, QP = products[..., 1:, :1], products[..., 1:, 1:]
    eye = torch.eye(ranks - 1, dtype=QP.dtype, device=QP.device)
    f = f[..., None, None]
    corrected = CB - f * CP @ torch.linalg.solve(eye + f * QP, QB)
    return dt[:, None] * corrected[..., 0, 0]


def cauchy_sums(a: Resolvents) -> Tensor:
    return a.pairs @ (1 / (a.one_less - a.half * a.poles[..., None]))
