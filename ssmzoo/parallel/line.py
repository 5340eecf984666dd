"""Communication that gradients flow through, in the same order on every process.

A backward pass runs what is ready, and that differs from process to process; yet communication has to meet its
counterpart. Each communication here hands a token to the next one, so that in the backward pass they follow one another
in exactly the reverse order, on every process, whether or not a process needs the gradient of what it sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssmkernels.core.crossing import note_backward
from ssmzoo.parallel.layout import Moves, take
from ssmzoo.parallel.states import Frame, Like, put_together, taken_apart
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
        self.tape: list[Any] | None = None  # what has come, where it may be asked for once more
        self.again: Iterator[Any] | None = None

    def gather(self, x: Tensor) -> Tensor:
        """x of every process, ``(ranks, …)``; all alike in shape. The gradient is summed over what each one made of it.

        Tensors that are neither floating nor complex have none.
        """
        if not (x.is_floating_point() or x.is_complex()):
            found: Tensor = self.once(lambda: all_gathered(x, self.group))
            return found
        out, self.token = _Gather.apply(x, self.token, self)
        return out

    def gather_each(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """Several tensors ``(s, …)`` of one dtype, of every process, in one go: a list for each process."""
        sizes = [math.prod(t.shape[1:]) for t in tensors]
        parts = self.gather(torch.cat([t.flatten(1) for t in tensors], dim=1)).split(sizes, dim=2)
        shaped = [part.reshape(self.ranks, *t.shape) for part, t in zip(parts, tensors, strict=True)]
        return [list(of_rank) for of_rank in zip(*(part.unbind(0) for part in shaped), strict=True)]

    def exchange(self, x: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        """Rows of x for each process, so many and one after another; and so many from each, likewise.

        Args:
            x: ``(l, …)``.
            sends: how many each process gets.
            receives: how many come from each.
        """
        out, self.token = _Exchange.apply(x, self.token, self, sends, receives)
        return out

    def move(self, x: Tensor, way: Moves) -> Tensor:
        """The rows of x ``(l, d)`` in another layout."""
        sent = torch.cat([take(x, spans) for spans in way.sends])
        return take(self.exchange(sent, [sum(b - a for a, b in spans) for spans in way.sends], way.receives), way.order)

    def once(self, communicate: Callable[[], Any]) -> Any:
        """What this gives; where the call is computed again, what it has given before, without communication."""
        if self.again is not None:
            return next(self.again)
        found = communicate()
        if self.tape is not None:
            self.tape.append(found)
        return found

    def peer(self, rank: int) -> int:
        """A process of the group, as torch.distributed numbers all."""
        return dist.get_global_rank(self.group, rank)

    def send_state(self, to: int, state: State) -> None:
        """Gives a state to a process, which receives it; the gradient of its tensors comes back from there."""
        frame, tensors = taken_apart(state)
        self.once(lambda: dist.send_object_list([frame], self.peer(to), group=self.group))
        self.token = _Send.apply(self.token, to, self, *tensors)

    def receive_state(self, source: int, device: torch.device) -> State:
        """What a process sends."""

        def frame() -> Frame:
            box: list[Any] = [None]
            dist.recv_object_list(box, self.peer(source), group=self.group)
            found: Frame = box[0]
            return found

        received: Frame = self.once(frame)
        self.token, *tensors = _Receive.apply(self.token, source, self, received.like, device)
        return put_together(received, tensors)

    def broadcast_state(self, source: int, state: State | None, device: torch.device) -> State:
        """The state of one process, on every one; the others give None. Its gradient is the sum of theirs."""
        frame, tensors = (None, []) if state is None else taken_apart(state)

        def everywhere() -> Frame:
            box: list[Any] = [frame]
            dist.broadcast_object_list(box, self.peer(source), group=self.group)
            found: Frame = box[0]
            return found

        shared: Frame = self.once(everywhere)
        self.token, *tensors = _Broadcast.apply(self.token, source, self, shared.like, device, *tensors)
        return put_together(shared, tensors)

    def close(self, x: Tensor, begin: Callable[[], None] | None) -> Tensor:
        """x, whose backward pass runs that of all communication so far; ``begin`` is called before it.

        The line lets go of that graph, parts of which know the line: neither would ever be freed.
        """
        token, self.token = self.token, torch.zeros(())
        return _Close.apply(x, token, begin)


def _real(x: Tensor) -> Tensor:
    """Numbers that every backend can send, in one stretch of memory."""
    x = x.detach().resolve_conj().contiguous()
    return torch.view_as_real(x) if x.is_complex() else x.view(torch.uint8) if x.dtype == torch.bool else x


def all_gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of every process, ``(ranks, …)``, without a gradient."""
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
    def forward(ctx: Any, x: Tensor, token: Tensor, line: Line) -> tuple[Tensor, Tensor]:
        ctx.group = line.group
        return line.once(lambda: all_gathered(x, line.group)).detach(), token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, token: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        mine = torch.empty_like(grad)
        dist.all_to_all(list(_real_view(mine).unbind(0)), list(_real(grad).unbind(0)), group=ctx.group)
        return mine.sum(0), token, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, line: Line, sends: list[int], receives: list[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.sends, ctx.receives = line.group, sends, receives
        return line.once(lambda: _exchanged(x, sends, receives, line.group)).detach(), token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, token: Tensor) -> tuple[Tensor | None, ...]:
        return _exchanged(grad, ctx.receives, ctx.sends, ctx.group), token, None, None, None


def _exchanged(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of x, so many to each process; and those that come, so many from each."""
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(_real_view(out), _real(x), receives, sends, group=group)
    return out


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, to: int, line: Line, *tensors: Tensor) -> Tensor:
        ctx.to, ctx.group = to, line.group
        ctx.like = [(tuple(x.shape), x.dtype) if _differentiable(x) else None for x in tensors]
        ctx.device = tensors[0].device if tensors else None
        line.once(lambda: _transfer(tensors, to, line.group, sends=True))
        return token.clone()

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Any, ...]:
        grads = _empty([like for like in ctx.like if like is not None], ctx.device)
        _transfer(grads, ctx.to, ctx.group, sends=False)
        rest = iter(grads)
        return token, None, None, *(None if like is None else next(rest) for like in ctx.like)


def _outputs(ctx: Any, token: Tensor, line: Line, received: Callable[[], list[Tensor]]) -> tuple[Tensor, ...]:
    """What a function's forward returns of what comes once; ``ctx.differentiable`` tells its backward pass apart."""
    tensors = [t.detach() for t in line.once(received)]
    ctx.mark_non_differentiable(*(x for x in tensors if not _differentiable(x)))
    ctx.differentiable = [_differentiable(x) for x in tensors]
    return token.clone(), *tensors


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, source: int, line: Line, like: Any, device: Any) -> Any:
        ctx.source, ctx.group = source, line.group

        def received() -> list[Tensor]:
            tensors = _empty(like, device)
            _transfer(tensors, source, line.group, sends=False)
            return tensors

        return _outputs(ctx, token, line, received)

    @staticmethod
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        wanted = [grad for grad, yes in zip(grads, ctx.differentiable, strict=True) if yes]
        _transfer(wanted, ctx.source, ctx.group, sends=True)
        return token, None, None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, source: int, line: Line, like: Any, device: Any, *given: Tensor) -> Any:
        ctx.group, ctx.given = line.group, len(given)

        def received() -> list[Tensor]:
            tensors = [x.detach().clone() for x in given] if given else _empty(like, device)
            for x in tensors:
                if x.numel():
                    flat = _real(x)
                    dist.broadcast(flat, line.peer(source), group=line.group)
                    if not given:
                        _real_view(x).copy_(flat)
            return tensors

        return _outputs(ctx, token, line, received)

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
        if torch.is_grad_enabled():
            raise ValueError("Context: `create_graph` must be False; gradients of gradients do not cross cuts")
        note_backward()
        if ctx.begin is not None:
            ctx.begin()
        return grad, grad.new_zeros((), dtype=torch.float32, device="cpu"), None
