"""An op's reference from its equation for one token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.packing import spans

State = Any  # a tensor, or a tuple of them where an op has several


class Recurrence:
    """Calls of an op, and of its step, by ``token(state, ...)``, which takes the op's arguments by name at one time.

    What has no time in a call but may have one, such as a fixed input map, gets an axis of length 1 for the batch. The
    token returns its output, in the precision of sums, and the state after it. The op's arguments ``initial_...`` are
    states, its results after the first those after the last token; a step's are what it writes. An op with several
    takes and returns them as a tuple, in the order of its signature.
    """

    def __init__(self, token: Callable[..., tuple[Tensor, State]]):
        functools.update_wrapper(self, token)
        self.token = token
        self.names = list(token.__code__.co_varnames[1 : token.__code__.co_argcount])

    def __call__(self, a: Any) -> tuple[Tensor, ...]:
        """The op over whole sequences: its output and final states."""
        declared = a.declared
        y, *empty = declared.outputs(a)
        initial = [getattr(a, name) for name in declared.takes if name.startswith("initial_")]
        states = [torch.zeros_like(e) if x is None else x.clone() for x, e in zip(initial, empty, strict=True)]
        timed, fixed = self._parts(a)
        if a.cu_seqlens is None:
            ys, states = self._run(states, timed, fixed)
            return self._joined(a, y, ys), *states
        every, lasts = [], [[state[:0] for state in states]]
        for i, time in spans(a.cu_seqlens):
            own = [state[i : i + 1] for state in states]
            ys, last = self._run(own, {name: x[:, time] for name, x in timed.items()}, fixed)
            every += ys
            lasts.append(last)
        return self._joined(a, y, every), *(torch.cat(parts) for parts in zip(*lasts, strict=True))

    def step(self, a: Any) -> Tensor:
        """One token; writes the states."""
        states = [getattr(a, name) for name in a.declared.mutates]
        y, after = self.token(_together(states), **{name: getattr(a, name) for name in self.names})
        for state, now in zip(states, _apart(after), strict=True):
            state.copy_(now)
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

    def _run(
        self, states: list[Tensor], timed: dict[str, Tensor], fixed: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        ys = []
        for t in range(next(iter(timed.values())).shape[1]):
            y, after = self.token(_together(states), **{name: x[:, t] for name, x in timed.items()}, **fixed)
            ys.append(y)
            states = _apart(after)
        return ys, states

    def _joined(self, a: Any, empty: Tensor, ys: list[Tensor]) -> Tensor:
        if ys:
            return torch.stack(ys, dim=1).to(empty.dtype)
        leader = getattr(a, a.declared.leader)
        return empty + 0 * leader.sum()  # part of the leader's graph, which has no elements either


def _together(states: list[Tensor]) -> State:
    return states[0] if len(states) == 1 else tuple(states)


def _apart(state: State) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def recurrence(token: Callable[..., tuple[Tensor, State]]) -> Recurrence:
    """Decorates the equation for one token: the reference's ``compute``."""
    return Recurrence(token)
