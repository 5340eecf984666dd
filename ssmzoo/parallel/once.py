"""An op that runs once on each part, from the true state before it and the true gradient of the state after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.parallel.adjoints import ADJOINTS
from ssmzoo.parallel.line import all_gathered
from ssmzoo.parallel.side import Side
from ssmzoo.parallel.steps import FOLDED, Traffic, gathered
from ssmzoo.parallel.transitions import TRANSITIONS

Given = Mapping[str, Any]


def run_once(name: str, side: Side, call: Callable[..., Any], given: Given) -> tuple[Tensor, Tensor]:
    """The op's output on this part, and its state: after all parts if that is kept.

    Forward, every process finds what its part leaves and its decay, and gathers those of all. Backward, it finds what
    its outputs' gradient asks of the state before the part, and gathers likewise. What nobody needs is zero: without a
    state that is kept, what the last part leaves, and always what the first part asks.
    """
    cut, line, adjoint = side.cut, side.line, ADJOINTS[name]
    given = {**given, "return_final_state": True}
    with torch.no_grad():
        E, M = line.once(lambda: _exchange(name, side, call, given))
        before = [given["initial_state"]]
        for r in range(cut.ranks if side.keeps else cut.rank):
            before.append(E[r] if before[-1] is None else adjoint.forth(E[r], M[r], before[-1]))
    entering = given["initial_state"] if cut.rank == 0 else before[cut.rank]
    after_all = before[cut.ranks] if side.keeps else E[0]
    forth = gathered(E[0], cut.ranks).sent
    back = forth * (1 + side.keeps)
    side.note(name, FOLDED, Traffic(forth + gathered(M[0], cut.ranks).sent, back))
    y, after = call(**{**given, "initial_state": entering})
    tensors = {key: t for key, t in given.items() if isinstance(t, Tensor) and not key.startswith("initial_")}
    y, after, line.token = _Through.apply(y, after, after_all, M, line.token, (name, side, given), *tensors.values())
    return y, after


def _exchange(name: str, side: Side, call: Callable[..., Any], given: Given) -> tuple[Tensor, Tensor]:
    """E and M of all parts, ``(ranks, s, …)``."""
    (like_E,), (like_M,), dtype = TRANSITIONS[name].like(given)
    E, M = (torch.zeros(shape, dtype=dtype, device=given["cu_seqlens"].device) for shape in (like_E, like_M))
    if side.keeps or side.cut.rank < side.cut.ranks - 1:
        first = side.cut.rank == 0
        own = given if first and ADJOINTS[name].matrices else {**given, "initial_state": None}
        E, M = ADJOINTS[name].found(call, own, first)
    both = all_gathered(torch.cat([E.to(dtype).flatten(1), M.to(dtype).flatten(1)], dim=1), side.line.group)
    all_E, all_M = both.split([E[0].numel(), M[0].numel()], dim=2)
    return all_E.reshape(-1, *E.shape), all_M.reshape(-1, *M.shape)


class _Through(torch.autograd.Function):
    """The op's results; with the gradient of its final state from the parts after it."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, after: Tensor, after_all: Tensor, M: Tensor, token: Tensor, call: Any, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        name, side, given = call
        ctx.name, ctx.side, ctx.M = name, side, M
        ctx.others = {key: value for key, value in given.items() if not isinstance(value, Tensor)}
        ctx.names = [key for key, t in given.items() if isinstance(t, Tensor) and not key.startswith("initial_")]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.like = y.shape, y.dtype, after.shape, after.dtype
        found = (after_all if side.keeps else after).clone()
        if not side.keeps:  # nobody uses it
            ctx.mark_non_differentiable(found)
        return y.view_as(y), found, token.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_after: Tensor | None, token: Tensor) -> tuple[Any, ...]:
        side, M, adjoint = ctx.side, ctx.M, ADJOINTS[ctx.name]
        cut, line = side.cut, side.line
        given = {**ctx.others, **dict(zip(ctx.names, ctx.saved_tensors, strict=True))}
        shape, dtype, like, wide = ctx.like
        dy = M.new_zeros(shape, dtype=dtype) if dy is None else dy
        asked = M.new_zeros(like, dtype=wide) if cut.rank == 0 else adjoint.asked(given, dy).to(wide)
        kept = [torch.zeros_like(asked) if d_after is None else d_after.to(wide)] * side.keeps
        parts = all_gathered(torch.stack([asked, *kept]), line.group)
        grad = parts[:, 1].sum(0) if side.keeps else torch.zeros_like(asked)
        for r in range(cut.ranks - 1, cut.rank, -1):
            grad = adjoint.back(parts[r, 0], M[r], grad)
        return dy, grad, None, None, token, None, *(None for _ in ctx.names)
