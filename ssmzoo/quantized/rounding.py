"""Matrices of weights rounded to few bits: each weight to the nearest, or with regard to what the map is given.

Data-aware rounding is GPTQ's (Frantar et al. 2022, arXiv 2210.17323, algorithm 1): input after input is rounded, and
the inputs after it take over its error as far as the inputs' second moments H = X Xᵀ allow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.quantized.scheme import BLOCK, Scheme

DAMPING = 0.01  # of H's mean diagonal, added to it
COLUMNS = 128  # of H that are worked on at once where a scale serves all of them
SHRINKING = tuple(1 - i / 16 for i in range(6))  # parts of the range of a group's weights that are tried


class Rounded(NamedTuple):
    """Weights as :func:`ssmkernels.quantized_linear` takes them."""

    weight: Tensor  # int8 (o, k), or uint8 (o, 16 ⌈k / 32⌉)
    scales: Tensor  # (o, g), float32; bfloat16 beside 4 bits, where they count
    zeros: Tensor | None  # uint8 (o, g), beside 4 bits


class _Grid(NamedTuple):
    """The numbers to which groups are rounded: (q - zero) · scale for q from low to high."""

    scale: Tensor  # (… 1) float32
    zero: Tensor  # (… 1) float32
    low: int
    high: int

    def whole(self, w: Tensor) -> Tensor:
        """q."""
        return (torch.round(w / self.scale) + self.zero).clamp(self.low, self.high)

    def value(self, q: Tensor) -> Tensor:
        return (q - self.zero) * self.scale


def to_nearest(weight: Tensor, scheme: Scheme) -> Rounded:
    """A weight ``(o, k)`` with each number rounded to the nearest that its group has."""
    w = weight.detach().float()
    size = min(scheme.group_size or w.shape[1], w.shape[1]) or 1
    groups = F.pad(w, (0, -w.shape[1] % size)).unflatten(1, (-1, size))  # (o g n); a 0 more changes no group's numbers
    grid = _grid(groups, scheme)
    return _rounded(grid.whole(groups).flatten(1)[:, : w.shape[1]], grid.scale[..., 0], grid.zero[..., 0], scheme)


def by_hessian(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Rounded:
    """A weight ``(o, k)``, rounded so that its products with the inputs behind the Hessian change least.

    Args:
        weight: of any floating-point dtype.
        hessian: H, the inputs' second moments ``(k, k)``, float32.
        scheme: of the result.
    """
    w, h = weight.detach().float().clone(), hessian.float().clone()
    k = w.shape[1]
    h.diagonal()[h.diagonal() == 0] = 1  # inputs that were always 0 so far: their weights are rounded to the nearest
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    grids: list[_Grid] = []
    whole = []
    for first in range(0, k, scheme.group_size or COLUMNS):
        last = min(k, first + (scheme.group_size or COLUMNS))
        if scheme.group_size or not grids:
            grids.append(_grid(w[:, first:last] if scheme.group_size else w, scheme))
        grid, part, errors = grids[-1], w[:, first:last], []
        own = inverse[first:last, first:last]
        for j in range(last - first):
            q = grid.whole(part[:, j : j + 1])
            error = (part[:, j : j + 1] - grid.value(q)) / own[j, j]
            part[:, j + 1 :] -= error * own[j, j + 1 :]
            whole.append(q)
            errors.append(error)
        w[:, last:] -= torch.cat(errors, dim=1) @ inverse[first:last, last:]
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*(grid[:2] for grid in grids), strict=True))
    return _rounded(torch.cat(whole, dim=1), scales, zeros, scheme)


def _grid(w: Tensor, scheme: Scheme) -> _Grid:
    """The grids of groups ``(… n)``; in 4 bits those of the least squared errors among a few ranges."""
    if scheme.bits == 8:
        scale = w.abs().amax(-1, keepdim=True) / 127
        return _Grid(torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale), -127, 127)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)  # the range holds 0
    grids = [_shrunk(low * part, high * part) for part in SHRINKING]
    errors = [(grid.value(grid.whole(w)) - w).square().sum(-1, keepdim=True) for grid in grids]
    best = torch.stack(errors).argmin(0, keepdim=True)
    scale, zero = (torch.stack(parts).gather(0, best)[0] for parts in zip(*(grid[:2] for grid in grids), strict=True))
    return _Grid(scale, zero, 0, 15)


def _shrunk(low: Tensor, high: Tensor) -> _Grid:
    scale = ((high - low) / 15).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return _Grid(scale, torch.round(-low / scale).clamp(0, 15), 0, 15)


def _rounded(q: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Rounded:
    """From q ``(o, k)`` and its groups' scales and zeros ``(o, g)``."""
    if scheme.bits == 8:
        return Rounded(q.to(torch.int8), scales, None)
    return Rounded(_packed(q.to(torch.uint8)), scales.bfloat16(), zeros.to(torch.uint8))


def _packed(q: Tensor) -> Tensor:
    """``(o, k)`` uint8 from 0 to 15 → ``(o, 16 ⌈k / 32⌉)``, two in a byte."""
    blocks = F.pad(q, (0, -q.shape[1] % BLOCK)).unflatten(1, (-1, 2, BLOCK // 2))
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).flatten(1)
