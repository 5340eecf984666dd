"""An op's reference from its equation for one token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.packing import spans


class Recurrence:
    """Calls of an op, and of its step, by ``token(state, ...)``, which takes the op's arguments by name at one time.

    What has no time in a call but may have one, such as a fixed input map, gets an axis of length 1 for the batch. The
    token returns its output, in the precision of sums, and the state after it.
    """

    def __init__(self, token: Callable[..., tuple[Tensor, Tensor]]):
        functools.update_wrapper(self, token)
        self.token = token
        self.names = list(token.__code__.co_varnames[1 : token.__code__.co_argcount])

    def __call__(self, a: Any) -> tuple[Tensor, Tensor]:
        """The op over whole sequences: its output and final states."""
        declared = a.declared
        y, state = declared.outputs(a)
        if a.initial_state is None:
            state = torch.zeros_like(state)
        else:
            state = a.initial_state.clone()
        timed, fixed = self._parts(a)
        if a.cu_seqlens is None:
            ys, state = self._run(state, timed, fixed)
            return self._joined(a, y, ys), state
        every, states = [], [state[:0]]
        for i, time in spans(a.cu_seqlens):
            ys, last = self._run(state[i : i + 1], {name: x[:, time] for name, x in timed.items()}, fixed)
            every += ys
            states.append(last)
        return self._joined(a, y, every), torch.cat(states)

    def step(self, a: Any) -> Tensor:
        """One token; writes the state."""
        y, state = self.token(a.state, **{name: getattr(a, name) for name in self.names})
        a.state.copy_(state)
        (empty,) = a.declared.results.values()
        return y.to(getattr(a, empty.dtypes[0]).dtype)

    def _parts(self, a: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The arguments that have time, and all others."""
        timed: dict[str, Tensor] = {}
        fixed: dict[str, Any] = {}
        for name in self.names:
            x, shape = getattr(a, name), a.declared.shapes.get(name, "")
            shapes = [s.split() for s in shape.split("|")]
            if not isinstance(x, Tensor) or not any("l" in s for s in shapes):
                fixed[name] = x
            elif any("l" in s and len(s) == x.ndim for s in shapes):
                timed[name] = x
            else:
                fixed[name] = x[None]
        return timed, fixed

    def _run(self, state: Tensor, timed: dict[str, Tensor], fixed: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
        ys = []
        for t in range(next(iter(timed.values())).shape[1]):
            y, state = self.token(state, **{name: x[:, t] for name, x in timed.items()}, **fixed)
            ys.append(y)
        return ys, state

    def _joined(self, a: Any, empty: Tensor, ys: list[Tensor]) -> Tensor:
        if ys:
            return torch.stack(ys, dim=1).to(empty.dtype)
        leader = getattr(a, a.declared.leader)
        return empty + 0 * leader.sum()  # part of the leader's graph, which has no elements either


def recurrence(token: Callable[..., tuple[Tensor, Tensor]]) -> Recurrence:
    """Decorates the equation for one token: the reference's ``compute``."""
    return Recurrence(token)
