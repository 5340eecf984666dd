"""The launches of the long convolution's Triton kernels, for sequences that lie channel by channel."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import all_registers, kernels, next_power_of_2, on_device_of

SMALLEST, LARGEST = 256, 4096  # complex points of a circle, each for two real ones
PROGRAMS = 512  # that share sums over sequences


def points_of(length: int, a: Any) -> int:
    """Complex points of a circle on which a sequence does not wrap around. Taps from the length-th on meet nothing."""
    after = max(min(a.kernel.shape[1], length) - 1, 0)
    ahead = min(_count(a.kernel_reverse), max(length - 1, 0))
    return max(SMALLEST, next_power_of_2(length + max(after, ahead)) // 2)


@dataclasses.dataclass(frozen=True)
class Circle:
    """Sequences that lie on circles of one size, whatever their neighbours: all of a batch, or some of a packed one.

    The kernels' spectra, too, depend on nothing but the size. All taps up to the size's half are in them: where a
    sequence is shorter than that, further ones do not come round to it, and where it is longer there are none.
    """

    points: int
    longest: int
    rows: int
    spans: Tensor | None  # int32 (rows, 2): borders of packed sequences

    @property
    def folded(self) -> bool:
        """Whether sequences take more than half of the circle."""
        return self.longest > self.points

    def options(self, warps: int = 16) -> dict[str, Any]:
        """Launch settings, with ``warps`` at most and on a multiprocessor."""
        own = min(self.points // 256, warps)
        return {"M": self.points, "num_warps": own, "num_stages": 1, **all_registers(32 * warps)}

    def sequences(self, x: Tensor) -> dict[str, Any]:
        """What kernels ask about x (b d l) and its sequences."""
        shape = {"rows": self.rows, "channels": x.shape[1], "length": x.shape[2]}
        return {"spans": self.spans, **shape, "FOLDED": self.folded}


def circles_of(a: Any) -> list[Circle]:
    """The circles of a call. Borders of packed sequences are read on the host."""
    b, length, _ = a.u.shape
    if a.cu_seqlens is None:
        return [Circle(points_of(length, a), length, b, None)]
    borders = a.cu_seqlens.tolist()
    found: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(borders):
        if start < end:
            found.setdefault(points_of(end - start, a), []).append((start, end))
    return [
        Circle(
            points,
            max(end - start for start, end in spans),
            len(spans),
            torch.tensor(spans, dtype=torch.int32).to(a.u.device),
        )
        for points, spans in sorted(found.items())
    ]


@functools.lru_cache(maxsize=32)
def _tables(m: int, device: torch.device) -> dict[str, Tensor]:
    """Matrices and twiddles as triton_transform.py has them."""

    def roots(rows: Tensor, columns: Tensor, half_turn: int) -> Tensor:
        """exp(iπ rows columns/half_turn) as (real and imaginary, rows, columns)."""
        angle = (rows[:, None] * columns % (2 * half_turn)).double() * (math.pi / half_turn)
        return torch.stack([angle.cos(), angle.sin()])

    def halves(x: Tensor) -> Tensor:
        high = x.half()
        return torch.stack([high, (x - high.double()).half()])

    n3 = m // 256
    sixteen, third, rest = (torch.arange(n) for n in (16, n3, m // 16))
    odd = 1 - 4 * sixteen
    several = torch.kron(roots(third, -2 * third, n3), torch.eye(16 // n3, dtype=torch.float64))
    matrices = (roots(odd, sixteen, 32), roots(sixteen, -2 * sixteen, 16), several)
    twiddles = (roots(odd, rest, 2 * m), roots(-2 * sixteen, third, 16 * n3))
    return {
        "matrices": torch.stack([halves(x) for x in matrices]).to(device),
        "twiddles": torch.cat([x.flatten() for x in twiddles]).float().to(device),
    }


def convolve(circles: list[Circle], a: Any, x: Tensor, gate: Tensor | None, adjoint: bool) -> Tensor:
    """x and gate (b d l) → the gated convolution of x with the taps and the skip of a call, or its adjoint, (b l d)."""
    d = x.shape[1]
    y = torch.empty_like(x)
    kernel, reverse = a.kernel, a.kernel_reverse
    D = None if a.D is None else a.D.contiguous()
    with on_device_of(x):
        for circle in circles:
            spectra = x.new_empty((d, 2, circle.points), dtype=torch.float32)
            tables, options = _tables(circle.points, x.device), circle.options()
            kernels(__package__).spectrum[(d,)](
                kernel,
                reverse,
                spectra,
                **tables,
                **_steps("kernel", kernel),
                **_steps("reverse", reverse),
                taps=min(kernel.shape[1], circle.points),
                ahead=min(_count(reverse), circle.points),
                **options,
            )
            kernels(__package__).convolve[(circle.rows * d,)](
                x, spectra, D, gate, y, **circle.sequences(x), **tables, ADJOINT=adjoint, **options
            )
    return y.mT.contiguous()


def _steps(name: str, taps: Tensor | None) -> dict[str, int]:
    """Strides of taps (d l_k) by the kernels' names."""
    return dict(zip((f"{name}_channel", f"{name}_step"), (0, 0) if taps is None else taps.stride(), strict=True))


def _count(taps: Tensor | None) -> int:
    return 0 if taps is None else taps.shape[1]


def correlate(circles: list[Circle], a: Any, x: Tensor, g: Tensor, gate: Tensor | None) -> dict[str, Tensor]:
    """x, g and gate (b d l) → the gradients of kernel, D and kernel_reverse, of those that are given."""
    d = x.shape[1]
    given = {name: w for name in ("kernel", "D", "kernel_reverse") if (w := getattr(a, name)) is not None}
    found = {name: w.new_zeros((len(circles), *w.shape), dtype=torch.float32) for name, w in given.items()}
    for i, circle in enumerate(circles):
        here = {name: total[i] for name, total in found.items()}
        dD = here.get("D")
        share = -(-circle.rows // max(1, PROGRAMS // d))
        parts = -(-circle.rows // share)
        sums = x.new_empty((parts, d, 2, circle.points), dtype=torch.float32)
        at_zero = None if dD is None else sums.new_empty((parts, d))
        tables = _tables(circle.points, x.device)
        with on_device_of(x):
            kernels(__package__).correlate[(d, parts)](
                x, g, gate, sums, at_zero, **circle.sequences(x), **tables, share=share, **circle.options(8)
            )
            kernels(__package__).lags[(d,)](
                sums,
                here["kernel"],
                here.get("kernel_reverse"),
                **tables,
                channels=d,
                parts=parts,
                taps=min(a.kernel.shape[1], circle.longest),
                ahead=min(_count(a.kernel_reverse), circle.longest - 1),
                kernel_channel=a.kernel.shape[1],
                reverse_channel=_count(a.kernel_reverse),
                **circle.options(),
            )
        if dD is not None and at_zero is not None:
            dD.copy_(at_zero.sum(0))
    return {name: total.sum(0) for name, total in found.items()}
