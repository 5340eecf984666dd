"""Ctrl-C, and the system's request to end, as something a loop asks for between two steps."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has saved itself.

    Attributes:
        folder: the run.
        step: the last step that was taken and saved.
    """

    def __init__(self, folder: Path, step: int, command: str | None = None):
        command = f"ssmzoo train --resume {folder}" if command is None else command
        super().__init__(f"stopped and saved after step {step}; continue with: {command}")
        self.folder = folder
        self.step = step


class Interrupt:
    """Inside its block the first SIGINT, SIGTERM or SIGHUP (a closed terminal) sets ``asked``; a second one ends the
    process as ever.

    Outside the main thread, where Python hears no signals, ``asked`` stays False.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            hangup = getattr(signal, "SIGHUP", None)  # Windows has none
            if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
                numbers.append(hangup)
            for number in numbers:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
