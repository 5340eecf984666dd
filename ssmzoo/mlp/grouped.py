"""A linear map for each of several groups of rows, in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.library import opaque
from ssmzoo.linear import linear


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows ``(m, d_in)`` times the transposed weights ``(groups, d_out, d_in)`` of their groups: ``(m, d_out)``.

    Args:
        x: sorted by group.
        weight: of all groups.
        counts: rows of each group ``(groups)``, int64; their sum is m.
    """
    if _may_group(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).int())
    return _separate(x, weight, counts)


def _one_by_one(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A product for each group that is not empty."""
    weights = weight.unbind(0)  # whose gradients are stacked once
    parts = [linear(part, weights[i]) for i, part in enumerate(x.split(counts.tolist())) if len(part)]
    return torch.cat(parts) if parts else linear(x, weights[0])


def _may_group(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these: bfloat16, with rows that begin at multiples of 16 bytes."""
    return (
        hasattr(F, "grouped_mm")
        and x.dtype == weight.dtype == torch.bfloat16
        and not any(size * x.itemsize % 16 for size in weight.shape[1:])
        and x.shape[0] > 0
    )


def _fake(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


# A compiler does not look into a loop that depends on data.
_separate = opaque("grouped_linear", _one_by_one, _fake)
