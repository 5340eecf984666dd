"""Who carries ops and mixers over the cuts of a sequence that is spread over processes; nobody, as a rule.

Context parallelism (``ssmzoo.parallel``) gives each process a part of every sequence. While it runs a model, whatever
mixes along time asks here, and passes its call on to the one that knows the other processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Crossing(Protocol):
    """One call of a model whose sequences are cut over processes. States are those of whole sequences."""

    @property
    def starts(self) -> Tensor:
        """int64 ``(s)``: tokens of each sequence in the parts before this one."""

    @property
    def totals(self) -> Tensor:
        """int64 ``(s)``: tokens of each sequence in all parts."""

    def op(self, name: str, call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """An op on this part: ``call(**given)`` with what came before it."""

    def mixer(self, mixer: Any, mix: Callable[..., Any], x: Tensor, state: Any, cu_seqlens: Tensor | None) -> Any:
        """A mixer on this part: ``mix(x, state, cu_seqlens)`` with what came before it."""

    def window(self, x: Tensor, before: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        """The ``width`` tokens before this part of each sequence, and the last ones of all parts, ``(s, width, d)``.

        Args:
            x: this part, ``(1, l, d)``.
            before: the tokens before the first part, ``(s, width, d)``; None for zeros.
            width: how many.
        """

    def carried(
        self, before: Tensor, left: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The state that enters this part of a linear system, and the one after all parts, ``(s, …)``.

        Args:
            before: the state before the first part.
            left: the state that this part leaves when it starts from zero.
            advance: a state and int64 ``(s)``, numbers of tokens → what becomes of it without inputs.
        """

    @property
    def whole_cu_seqlens(self) -> Tensor:
        """int32 ``(s + 1)``, the borders of whole sequences, one after another."""

    def whole(self, x: Tensor) -> Tensor:
        """The whole sequences ``(1, l, …)``, one after another, of x ``(1, l, …)``, this part."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of what every process gives."""

    def share(self, count: int) -> slice:
        """Which of so many channels, or taps of a filter, are this process's."""

    def channels(self, tensors: list[Tensor]) -> list[Tensor]:
        """Whole sequences of this process's channels, ``(1, L, d_r)``, of each tensor ``(1, l, d)``, this part."""

    def taps(self, filters: list[Tensor], count: int) -> list[Tensor]:
        """All taps of this process's channels, ``(d_r, count)``, of each filter's own taps ``(d, share)``."""

    def tokens(self, y: Tensor, channels: int) -> Tensor:
        """All channels of this part, ``(1, l, channels)``, of whole sequences of this process's, ``(1, L, d_r)``."""

    def picked(self, x: Tensor, last: bool) -> Tensor:
        """The first or last token of each sequence in all parts, ``(s, d)``, of x ``(1, l, d)``, this part."""


_open: list[Crossing | None] = []  # process-wide, as a process has one part


def current() -> Crossing | None:
    """The one that carries calls over the cuts now; None where sequences are whole."""
    return _open[-1] if _open else None


@contextlib.contextmanager
def crossing(by: Crossing | None) -> Iterator[None]:
    """Within, calls are carried over by this one; with None they see their arguments alone."""
    _open.append(by)
    try:
        yield
    finally:
        _open.pop()


_backward: set[int] = set()  # backward passes through calls that were carried over cuts, by PyTorch's number


def note_backward() -> None:
    """Called in a backward pass through a call that was carried over cuts."""
    _backward.clear()
    _backward.add(torch._C._current_graph_task_id())


def check_not_again(name: str) -> None:
    """Raises RuntimeError where a mixer is computed again in such a pass, as checkpointing does."""
    if _backward and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() in _backward:
        raise RuntimeError(
            f"{name}: activation checkpointing cannot compute a mixer again whose sequences are cut over processes, "
            f"unless it is told to by `context_fn=ssmzoo.parallel.checkpoint_contexts` with `use_reentrant=False`"
        )


def in_whole(row: Tensor, step: Tensor) -> Tensor:
    """Where tokens of packed sequences stand in them: ``step`` in what is here of sequence ``row``, ``(l)`` each."""
    over = current()
    return step if over is None else over.starts[row] + step


def whole_lengths(cu_seqlens: Tensor) -> Tensor:
    """How many tokens packed sequences have, ``(s)``, in all parts together."""
    over = current()
    return cu_seqlens.diff() if over is None else over.totals
