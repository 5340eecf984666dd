"""Sums over the processes that share a layer, with their gradients, and modules with such sums in them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear, linear


class Enter(torch.autograd.Function):
    """x, which every process has and uses for its own part: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class Leave(torch.autograd.Function):
    """The sum of what all processes have, which all then use alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of what all processes have, which each uses for its own part."""
    return Enter.apply(Leave.apply(x, group), group)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


class SummedLinear(Linear):
    """A linear map, of whose inputs each process has some: products are added up over the processes.

    Attributes:
        own: the result goes into this process's own part of the layer; otherwise into the residual stream.
    """

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup, own: bool):
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self._parameters.update(whole._parameters)
        self.group, self.own = group, own

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        y = total(y, self.group) if self.own else Leave.apply(y, self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SummedGatedRMSNorm(nn.Module):
    """:class:`~ssmzoo.norm.GatedRMSNorm` over channels of which each process has some.

    Args:
        weight: of the channels here.
        channels: how many there are in all.
    """

    def __init__(
        self, weight: nn.Parameter, channels: int, eps: float, norm_before_gate: bool, group: dist.ProcessGroup
    ):
        super().__init__()
        self.weight = weight
        self.channels, self.eps, self.norm_before_gate, self.group = channels, eps, norm_before_gate, group

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y and the gate ``(..., d)`` → ``(..., d)``, in y's dtype."""
        wide = precision(y)
        x, z = y.to(wide), F.silu(gate.to(wide))
        x = x if self.norm_before_gate else x * z
        squares = total(x.square().sum(-1, keepdim=True), self.group)
        x = x * torch.rsqrt(squares / self.channels + self.eps) * self.weight.to(wide)
        return (x * z if self.norm_before_gate else x).to(y.dtype)
