"""Models that stay as they are for a while, so that nobody has to look at each token whether they do."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence

from torch import nn


class Period:
    """A time during which a model stays as it is.

    Attributes:
        kept: what stays alive until it ends, by whose it is, such as the memory of weights that prepared calls read.
        states: those that prepared calls run on unasked, by whose calls they are, and what is in them; also until then.
    """

    def __init__(self) -> None:
        self.kept: dict[object, object] = {}
        self.states: dict[object, tuple[Sequence[object], object]] = {}
        self.users = 0


_periods: weakref.WeakKeyDictionary[nn.Module, Period] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Says that a model's weights, options, parts and hooks stay as they are, until the last thread has left.

    States, too: those that one call returns and the next is given. What is changed nevertheless need not take effect.
    """
    with _lock:
        period = _periods.setdefault(model, Period())
        period.users += 1
    try:
        yield
    finally:
        with _lock:
            period.users -= 1
            ended = period.users == 0
            if ended:
                _periods.pop(model, None)  # at a program's end it may be gone
        if ended:  # without the lock, as what is freed here may call anybody
            period.kept.clear()
            period.states.clear()


def period_of(model: nn.Module) -> Period | None:
    """The one that a model is in, if any."""
    return _periods.get(model)
