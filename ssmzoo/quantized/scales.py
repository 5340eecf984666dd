"""Scales of inputs that make 4-bit weights lose less: AWQ (Lin et al. 2023, arXiv 2306.00978).

Weights of inputs that are large matter more. They are multiplied by s > 1 before they are rounded, and the inputs are
divided by it: Q(W diag(s)) diag(s)⁻¹ x. The paper takes s = x̄^α, with x̄ the mean magnitude of each input, and the α of
a grid for which outputs change least. Two things differ here: x̄ is the root mean square, and s is rounded to powers of
two, so that dividing by it is exact wherever that happens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmkernels.ops.quantized_linear.reference import dequantized
from ssmzoo.quantized.rounding import to_nearest
from ssmzoo.quantized.scheme import Scheme

GRID = 20  # values of α from 0 to 1, beside 0 itself
LARGEST = 8  # of the exponents of two


def best_scale(maps: Sequence[tuple[Tensor, Scheme]], hessian: Tensor) -> Tensor:
    """s ``(k)``, float32, for maps that are given the same inputs; ones where no other choice is better.

    Args:
        maps: weights ``(o, k)`` and how they will be kept.
        hessian: the inputs' second moments X Xᵀ, ``(k, k)`` float32.
    """
    logs = hessian.diagonal().log2() / 2
    used = logs.isfinite()
    best = torch.ones_like(logs)
    if not used.any():
        return best
    logs = torch.where(used, logs - (logs[used].amin() + logs[used].amax()) / 2, 0.0)
    least, tried = _error(maps, hessian, best), {tuple(best.tolist())}
    for i in range(1, GRID + 1):
        s = torch.exp2((logs * (i / GRID)).round().clamp(-LARGEST, LARGEST))
        if tuple(s.tolist()) in tried:
            continue
        tried.add(tuple(s.tolist()))
        error = _error(maps, hessian, s)
        if error < least:
            best, least = s, error
    return best


def _error(maps: Sequence[tuple[Tensor, Scheme]], hessian: Tensor, s: Tensor) -> float:
    """The summed squared change of all outputs, tr(E H Eᵀ), where weights change by E."""
    total = 0.0
    for weight, scheme in maps:
        w = weight.detach().float()
        found = dequantized(*to_nearest(w * s, scheme), scheme.group_size, w.shape[1], torch.float32) / s
        change = found - w
        total += float(((change @ hessian) * change).sum())
    return total
