"""Ctrl-C and the processes that a process starts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Processes started inside never hear Ctrl-C; in this one it waits for the end of the block, and is raised there.

    A terminal sends Ctrl-C to the whole group, and a process that hears it while it still imports prints a traceback.
    So those started inside have it blocked, call :func:`deaf` first, and are ended by whoever started them. Windows
    knows no blocked signals. Outside the main thread, where Python handles no signals, nothing is held back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    block = getattr(signal, "pthread_sigmask", None)
    if block:
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # any process needs it, and its start unblocks Ctrl-C
    heard = []
    # Another thread, such as one of a BLAS library, may still receive a signal that is blocked in this one
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    mask = block(signal.SIG_BLOCK, {signal.SIGINT}) if block else None
    try:
        yield
    finally:
        if block:
            block(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def deaf() -> None:
    """This process ignores Ctrl-C from now on: the one that started it ends it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
