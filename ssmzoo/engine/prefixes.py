"""States after the beginnings of prompts, for requests that begin in the same way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from ssmzoo.state import State


class Prefix(NamedTuple):
    """The state after a prompt's first ``position`` tokens."""

    position: int
    state: State


class Prefixes:
    """Snapshots at borders of pages, the least recently used first.

    A snapshot copies states of a fixed size and shares the pages of caches.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.kept: OrderedDict[bytes, Prefix] = OrderedDict()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each snapshot."""
        return [prefix.position for prefix in self.kept.values()]

    def add(self, digest: bytes, position: int, state: State) -> None:
        """Keeps a snapshot of a state, unless there is one."""
        if digest not in self.kept:
            self.kept[digest] = Prefix(position, state.clone())

    def longest(self, borders: Sequence[bytes], after: int, before: int) -> Prefix | None:
        """A prompt's longest snapshot of more tokens than ``after`` and fewer than ``before``, found by its digests."""
        for i in range((before - 1) // self.page_size, after // self.page_size, -1):
            found = self.kept.get(borders[i - 1])
            if found is not None:
                self.kept.move_to_end(borders[i - 1])
                return found
        return None

    def drop_oldest(self) -> bool:
        """Forgets the least recently used one; whether there was any."""
        if self.kept:
            self.kept.popitem(last=False)
            return True
        return False
