"""Communication that gradients flow through, in the same order on every process.

A backward pass runs what is ready, and that differs from process to process; yet communication has to meet its
counterpart. Each communication here hands a token to the next one, so that in the backward pass they follow one another
in exactly the reverse order, on every process, whether or not a process needs the gradient of what it sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssmkernels.core.crossing import note_backward
from ssmzoo.parallel.states import Like, put_together, taken_apart
from ssmzoo.state import State


class Line:
    """The communication of one call, one after another.

    Args:
        group: the processes; their ranks in it are the order of the parts.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.ranks = group.rank(), group.size()
        self.token = torch.zeros((), requires_grad=torch.is_grad_enabled())

    def gather(self, x: Tensor) -> Tensor:
        """x of every process, ``(ranks, …)``; all alike in shape. The gradient is summed over what each one made of it.

        Tensors that are neither floating nor complex have none.
        """
        if not (x.is_floating_point() or x.is_complex()):
            return _gathered(x, self.group)
        out, self.token = _Gather.apply(x, self.token, self.group)
        return out

    def gather_each(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """Several tensors ``(s, …)`` of one dtype, of every process, in one go: a list for each process."""
        sizes = [math.prod(t.shape[1:]) for t in tensors]
        parts = self.gather(torch.cat([t.flatten(1) for t in tensors], dim=1)).split(sizes, dim=2)
        shaped = [part.reshape(self.ranks, *t.shape) for part, t in zip(parts, tensors, strict=True)]
        return [list(of_rank) for of_rank in zip(*(part.unbind(0) for part in shaped), strict=True)]

    def exchange(self, x: Tensor, sends: list[Tensor], receives: list[int]) -> Tensor:
        """Rows of x for each process, and what each has for this one, one after another.

        Args:
            x: ``(l, d)``.
            sends: int64, which rows each process gets.
            receives: how many come from each.
        """
        out, self.token = _Exchange.apply(x, self.token, self.group, sends, receives)
        return out

    def send_state(self, to: int, state: State) -> None:
        """Gives a state to a process, which receives it; the gradient of its tensors comes back from there."""
        frame, tensors = taken_apart(state)
        dist.send_object_list([frame], dist.get_global_rank(self.group, to), group=self.group)
        self.token = _Send.apply(self.token, to, self.group, *tensors)

    def receive_state(self, source: int, device: torch.device) -> State:
        """What a process sends."""
        box: list[Any] = [None]
        dist.recv_object_list(box, dist.get_global_rank(self.group, source), group=self.group)
        self.token, *tensors = _Receive.apply(self.token, source, self.group, box[0].like, device)
        return put_together(box[0], tensors)

    def broadcast_state(self, source: int, state: State | None, device: torch.device) -> State:
        """The state of one process, on every one; the others give None. Its gradient is the sum of theirs."""
        frame, tensors = (None, []) if state is None else taken_apart(state)
        box: list[Any] = [frame]
        dist.broadcast_object_list(box, dist.get_global_rank(self.group, source), group=self.group)
        self.token, *tensors = _Broadcast.apply(self.token, source, self.group, box[0].like, device, *tensors)
        return put_together(box[0], tensors)

    def close(self, x: Tensor, begin: Callable[[], None] | None) -> Tensor:
        """x, whose backward pass runs that of all communication so far; ``begin`` is called before it."""
        return _Close.apply(x, self.token, begin)


def _real(x: Tensor) -> Tensor:
    """Numbers that every backend can send, in one stretch of memory."""
    x = x.detach().resolve_conj().contiguous()
    return torch.view_as_real(x) if x.is_complex() else x.view(torch.uint8) if x.dtype == torch.bool else x


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(_real_view(out).unbind(0)), _real(x), group=group)
    return out


def _real_view(x: Tensor) -> Tensor:
    """The same memory, to write what :func:`_real` sends."""
    return torch.view_as_real(x) if x.is_complex() else x.view(torch.uint8) if x.dtype == torch.bool else x


def _transfer(tensors: Sequence[Tensor], peer: int, group: dist.ProcessGroup, sends: bool) -> None:
    """Sends tensors to a process, or receives them from it in their memory."""
    there = dist.get_global_rank(group, peer)
    for x in tensors:
        if x.numel() and sends:
            dist.send(_real(x), there, group=group)
        elif x.numel():
            dist.recv(_real_view(x), there, group=group)


def _differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _empty(like: Like, device: torch.device) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in like]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return _gathered(x, group), token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, token: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        mine = torch.empty_like(grad)
        dist.all_to_all(list(_real_view(mine).unbind(0)), list(_real(grad).unbind(0)), group=ctx.group)
        return mine.sum(0), token, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, group: dist.ProcessGroup, sends: list[Tensor], receives: list[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.sends, ctx.receives, ctx.rows = group, sends, receives, x.shape[0]
        counts = [len(rows) for rows in sends]
        return _exchanged(x[torch.cat(sends)], counts, receives, group), token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, token: Tensor) -> tuple[Tensor | None, ...]:
        counts = [len(rows) for rows in ctx.sends]
        back = _exchanged(grad, ctx.receives, counts, ctx.group)
        return (
            grad.new_zeros(ctx.rows, grad.shape[1]).index_add_(0, torch.cat(ctx.sends), back),
            token,
            None,
            None,
            None,
        )


def _exchanged(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of x, so many to each process; and those that come, so many from each."""
    out = x.new_empty(sum(receives), x.shape[1])
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
    return out


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, to: int, group: dist.ProcessGroup, *tensors: Tensor) -> Tensor:
        ctx.to, ctx.group = to, group
        ctx.like = [(tuple(x.shape), x.dtype) if _differentiable(x) else None for x in tensors]
        ctx.device = tensors[0].device if tensors else None
        _transfer(tensors, to, group, sends=True)
        return token.clone()

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Any, ...]:
        grads = _empty([like for like in ctx.like if like is not None], ctx.device)
        _transfer(grads, ctx.to, ctx.group, sends=False)
        rest = iter(grads)
        return token, None, None, *(None if like is None else next(rest) for like in ctx.like)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, source: int, group: dist.ProcessGroup, like: Any, device: Any) -> Any:
        ctx.source, ctx.group = source, group
        tensors = _empty(like, device)
        _transfer(tensors, source, group, sends=False)
        ctx.mark_non_differentiable(*(x for x in tensors if not _differentiable(x)))
        ctx.differentiable = [_differentiable(x) for x in tensors]
        return token.clone(), *tensors

    @staticmethod
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        wanted = [grad for grad, yes in zip(grads, ctx.differentiable, strict=True) if yes]
        _transfer(wanted, ctx.source, ctx.group, sends=True)
        return token, None, None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, source: int, group: dist.ProcessGroup, like: Any, device: Any, *given: Tensor
    ) -> Any:
        ctx.source, ctx.group, ctx.given = source, group, len(given)
        there = dist.get_global_rank(group, source)
        tensors = [x.detach().clone() for x in given] if given else _empty(like, device)
        for x in tensors:
            if x.numel():
                flat = _real(x)
                dist.broadcast(flat, there, group=group)
                if not given:
                    _real_view(x).copy_(flat)
        ctx.mark_non_differentiable(*(x for x in tensors if not _differentiable(x)))
        ctx.differentiable = [_differentiable(x) for x in tensors]
        return token.clone(), *tensors

    @staticmethod
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        summed: list[Tensor | None] = []
        for grad, yes in zip(grads, ctx.differentiable, strict=True):
            if yes and grad.numel():
                grad = grad.resolve_conj().contiguous().clone()
                dist.all_reduce(_real_view(grad), group=ctx.group)
            summed.append(grad if yes else None)
        return token, None, None, None, None, *(summed if ctx.given else ())


class _Close(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, begin: Callable[[], None] | None) -> Tensor:
        ctx.begin = begin
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        note_backward()
        if ctx.begin is not None:
            ctx.begin()
        return grad, grad.new_zeros((), dtype=torch.float32, device="cpu"), None
