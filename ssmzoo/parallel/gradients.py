"""Gradients of the weights, added up over processes; and of outputs that every process has."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GradientSums:
    """Adds up what a backward pass adds to the weights' gradients, once it has ended."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup):
        self.parameters, self.group = list(model.parameters()), group
        self.earlier: list[Tensor | None] | None = None

    def begin(self) -> None:
        """Called in a backward pass, before it reaches a weight: puts aside the gradients of earlier passes."""
        if self.earlier is None:
            self.earlier = [parameter.grad for parameter in self.parameters]
            for parameter in self.parameters:
                parameter.grad = None
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    @torch.no_grad()
    def _end(self) -> None:
        earlier, self.earlier = self.earlier, None
        given = torch.tensor([parameter.grad is not None for parameter in self.parameters], dtype=torch.int32)
        given = given.to(self.parameters[0].device)
        dist.all_reduce(given, group=self.group)
        for parameter, some, before in zip(self.parameters, given.tolist(), earlier or [], strict=True):
            if some:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
                dist.all_reduce(torch.view_as_real(grad) if grad.is_complex() else grad, group=self.group)
                parameter.grad = grad
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)


class Once(torch.autograd.Function):
    """Outputs that every process has, for a loss that each computes alike: together they count once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None
