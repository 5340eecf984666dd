"""What a layer of transformers knows and does not tell the functions that it calls."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor


@dataclasses.dataclass
class Scope:
    """One call of a layer.

    Attributes:
        states: the states from which its scans go on, in the order of the scans.
        seq_idx: integers ``(b, l)``, the sequences that are packed into its rows.
    """

    states: list[Tensor] = dataclasses.field(default_factory=list)
    seq_idx: Tensor | None = None

    def next_state(self) -> Tensor | None:
        return self.states.pop(0) if self.states else None


_scope: ContextVar[Scope | None] = ContextVar("scope", default=None)
_NOTHING = Scope()


def current() -> Scope:
    """The scope of the innermost layer, empty where none was told."""
    return _scope.get() or _NOTHING


@contextlib.contextmanager
def entered(scope: Scope) -> Iterator[None]:
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)
