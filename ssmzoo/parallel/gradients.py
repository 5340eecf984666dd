"""Gradients of the weights, added up over processes; and of outputs that every process has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 25 * 2**20  # bytes of gradients that are added up at once, as in DDP


class GradientSums:
    """Adds up what a backward pass adds to the weights' gradients, once it has ended; many small ones at once."""

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
        summed = [parameter for parameter, some in zip(self.parameters, given.tolist(), strict=True) if some]
        for parameter in summed:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        for bucket in _buckets([_numbers(parameter.grad) for parameter in summed]):
            _add_up(bucket, self.group)
        for parameter, before in zip(self.parameters, earlier or [], strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)


def _numbers(grad: Tensor | None) -> Tensor:
    """A gradient's real numbers, one after another, in its own memory."""
    assert grad is not None
    return (torch.view_as_real(grad) if grad.is_complex() else grad).view(-1)


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype that have at most :data:`BUCKET` bytes together; larger ones are alone."""
    bucket: list[Tensor] = []
    for grad in grads:
        size = sum(each.nbytes for each in (*bucket, grad))
        if bucket and (grad.dtype != bucket[0].dtype or size > BUCKET):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


def _add_up(bucket: list[Tensor], group: dist.ProcessGroup) -> None:
    """The sums over the processes, in the place of these."""
    flat = bucket[0] if len(bucket) == 1 else torch.cat(bucket)
    dist.all_reduce(flat, group=group)
    if len(bucket) > 1:
        for grad, summed in zip(bucket, flat.split([len(each) for each in bucket]), strict=True):
            grad.copy_(summed)


class Once(torch.autograd.Function):
    """Outputs that every process has, for a loss that each computes alike: together they count once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None
