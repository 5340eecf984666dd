"""A linear map for each of several groups of rows, in one call."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.library import opaque
from ssmkernels.core.plain import why_not_plain
from ssmzoo.linear import linear


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows ``(m, d_in)`` times the transposed weights ``(groups, d_out, d_in)`` of their groups: ``(m, d_out)``.

    Args:
        x: sorted by group.
        weight: of all groups.
        counts: rows of each group ``(groups)``, int64; their sum is m.
    """
    if x.dtype == torch.bfloat16 and _fits(x, weight):
        return _at_once(x, weight, counts)
    return _separate(x, weight, counts)


def _at_once(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """PyTorch's grouped product."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).int())


def _one_by_one(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A product for each group that is not empty; PyTorch's grouped product where it takes float32."""
    takes = x.dtype == torch.float32 and x.is_cpu and _fits(x, weight) and _takes_float32()
    if takes and not why_not_plain({0: x, 1: weight, 2: counts}):
        return _at_once(x, weight, counts)
    weights = weight.unbind(0)  # whose gradients are stacked once
    parts = [linear(part, weights[i]) for i, part in enumerate(x.split(counts.tolist())) if len(part)]
    return torch.cat(parts) if parts else linear(x, weights[0])


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product takes the shapes: it wants rows that begin at multiples of 16 bytes."""
    return (
        hasattr(F, "grouped_mm")
        and x.dtype == weight.dtype
        and not any(size * x.itemsize % 16 for size in weight.shape[1:])
        and x.shape[0] > 0
    )


@functools.cache
def _takes_float32() -> bool:
    """Whether this PyTorch has a grouped product of float32 for CPUs; its compilers know that of bfloat16 alone."""
    try:
        F.grouped_mm(torch.ones(1, 4), torch.ones(1, 4, 4), offs=torch.ones(1, dtype=torch.int32))
    except RuntimeError:
        return False
    return True


def _fake(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


# A compiler does not look into a loop that depends on data.
_separate = opaque("grouped_linear", _one_by_one, _fake)
