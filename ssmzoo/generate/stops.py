"""Text as it comes, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on piece by piece, and ends before the first stop string.

    Args:
        stops: texts that end it; empty ones are left out.

    Attributes:
        stopped: whether one came.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""  # may be the start of a stop string
        self.stopped = False

    def add(self, text: str) -> str:
        """What is certain to come before a stop string, once more text has come; empty after one."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)], True
            return self.rest()
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        cut = len(self._held) - max(lengths, default=0)
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        """What was held back, where no more text will come."""
        text, self._held = self._held, ""
        return text
