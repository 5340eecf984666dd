"""A linear map for each of several groups of rows, in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    if torch.compiler.is_compiling():
        return _opaque(x, weight, counts)
    return _one_by_one(x, weight, counts)


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


# While compiling: an operator whose inside, a loop that depends on data, the compiler does not see.


@torch.library.custom_op("ssmzoo::grouped_linear", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _one_by_one(x, weight, counts)


@torch.library.custom_op("ssmzoo::grouped_outer", mutates_args=())
def _outer(x: Tensor, dy: Tensor, counts: Tensor) -> Tensor:
    """The gradient of the weights: dyᵀ x of each group."""
    sizes = counts.tolist()
    return torch.stack([b.T @ a for a, b in zip(x.split(sizes), dy.split(sizes), strict=True)])


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(x: Tensor, dy: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, counts = ctx.saved_tensors  # type: ignore[attr-defined]
    return _opaque(dy, weight.transpose(1, 2).contiguous(), counts), _outer(x, dy, counts), None


_opaque.register_autograd(_backward, setup_context=_keep)
