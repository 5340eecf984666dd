"""What xLSTM's layers are made of: maps of each head by itself, a convolution, how weights start."""

from __future__ import annotations

import math

import torch
from einops import einsum
from torch import Tensor, nn

from ssmkernels.core.autocast import autocasts


class HeadwiseLinear(nn.Module):
    """A block-diagonal map: of d channels each of h heads maps its own d/h. The weight is ``(h, out, in)``.

    Args:
        d: channels in and out.
        n_heads: h.
        bias: whether a bias ``(d)`` is added.
    """

    def __init__(self, d: int, n_heads: int, bias: bool = False):
        super().__init__()
        self.n_heads, width = n_heads, d // n_heads
        self.weight = nn.Parameter(torch.empty(n_heads, width, width))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None
        small_init(self.weight, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.n_heads, -1))
        y = einsum(heads, self.weight, "... h i, h o i -> ... h o").flatten(-2)
        return y if self.bias is None else y + self.bias


class CausalConv(nn.Module):
    """Holds a depthwise convolution under its published name; an op does the convolution."""

    def __init__(self, d: int, width: int, bias: bool):
        super().__init__()
        self.conv = nn.Conv1d(d, d, width, groups=d, bias=bias)


def may_step(x: Tensor) -> bool:
    """Whether a state may be updated in place: nobody wants gradients."""
    return not torch.is_grad_enabled() and not autocasts(x.device.type)


@torch.no_grad()
def small_init(weight: Tensor, d: int) -> None:
    """Normal of standard deviation √(2 / 5d) (Nguyen and Salazar 2019, arXiv 1910.05895)."""
    if not weight.is_meta:  # where a draw would import PyTorch's compiler
        nn.init.normal_(weight, std=math.sqrt(2 / (5 * d)))
