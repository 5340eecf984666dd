"""What a layer of transformers knows and does not tell the functions that it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

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


_NOTHING = Scope()


class _Here(threading.local):
    """One for each thread: an attribute, which Dynamo reads, guards and sets, as it does no context variable.

    It is the instance's from the start, as a class's own value could be taken for it.
    """

    def __init__(self) -> None:
        self.scope = _NOTHING


_here = _Here()


def current() -> Scope:
    """The scope of the innermost layer, empty where none was told."""
    return _here.scope


@contextlib.contextmanager
def entered(scope: Scope) -> Iterator[None]:
    before = _here.scope
    _here.scope = scope
    try:
        yield
    finally:
        _here.scope = before
