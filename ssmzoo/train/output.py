"""Standard output that may go away while a run goes on."""

from __future__ import annotations

import os
from typing import Any, TextIO


class Output:
    """Writes to a stream until its reader or terminal has gone, then to nothing; always to nothing without a stream.

    Attributes:
        closed_early: whether that has happened.
    """

    def __init__(self, stream: TextIO | None):  # Python has none where standard output is closed from the start
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.closed_early = False

    def write(self, text: str) -> int:
        if not self.closed_early:
            try:
                self._stream.write(text)
            except OSError:
                self.closed_early = True
        return len(text)

    def flush(self) -> None:
        if not self.closed_early:
            try:
                self._stream.flush()
            except OSError:
                self.closed_early = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
