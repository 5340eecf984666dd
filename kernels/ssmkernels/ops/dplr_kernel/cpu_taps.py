"""The taps of a diagonal plus low-rank system in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.declaration import Declaration


def dplr_taps(
    diagonal: Tensor, left: Tensor, right: Tensor, B: Tensor, C: Tensor, length: int, pairs: bool, single: bool
) -> Tensor:
    """C Ā^t B̄ for t < length, where Ā = D - Σ_r left_r right_r, in PyTorch: one power after another.

    All in real numbers and float64: ``(d, N)``, and left and right ``(d, r, N)``. With ``pairs`` N = 2n, and D is of n
    blocks [Re -Im; Im Re] of ``diagonal`` = [Re, Im]; otherwise it is that itself. Returns float32 if ``single``.
    """
    h, found = B, []
    re, im = diagonal.chunk(2, dim=1) if pairs else (diagonal, None)
    for _ in range(length):
        found.append((C * h).sum(-1))
        corrections = torch.einsum("drn,drm,dm->dn", left, right, h)
        if im is None:
            turned = re * h
        else:
            x, y = h.chunk(2, dim=1)
            turned = torch.cat([re * x - im * y, im * x + re * y], dim=1)
        h = turned - corrections
    return torch.stack(found, dim=1).to(torch.float32 if single else torch.float64)


SHAPES = {"diagonal": "d N", "left": "d r N", "right": "d r N", "B": "d N", "C": "d N"}
DECLARED = Declaration(dplr_taps, SHAPES, {"K": "d length"}, None, ())


def forward(a: Any, save: bool) -> Tensor:
    (K,) = empty(a, save)
    values, _kept = _values(a)
    native.run("dplr_kernel", values | {"K": K.data_ptr()})
    return K


def empty(a: Any, _: bool) -> tuple[Tensor]:
    dtype = torch.float32 if a.single else torch.float64
    return (a.diagonal.new_empty((a.diagonal.shape[0], a.length), dtype=dtype),)


def backward(a: Any, _: Any, grads: Any) -> dict[str, Tensor]:
    values, _kept = _values(a)
    dK = grads.K.contiguous()
    found = {name: torch.empty_like(getattr(a, name), memory_format=torch.contiguous_format) for name in SHAPES}
    addresses = {"d" + name: g.data_ptr() for name, g in found.items()}
    native.run("dplr_kernel_backward", values | addresses | {"K": 0, "dK": dK.data_ptr()})
    return found


def _values(a: Any) -> tuple[dict[str, int], list[Tensor]]:
    """The kernel's arguments except the output, and the tensors that they point into."""
    tensors = {name: getattr(a, name).contiguous() for name in SHAPES}
    d, rank, N = a.left.shape
    n = N // 2 if a.pairs else N
    values = {name: x.data_ptr() for name, x in tensors.items()}
    values |= {"d": d, "n": n, "rank": rank, "length": a.length, "pairs": a.pairs, "single": a.single}
    return values | {"threads": native.threads(d * N * a.length)}, list(tensors.values())
