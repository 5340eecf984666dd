"""The thread that the engine runs in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from ssmzoo.engine import Engine, Request

TRIES = 3  # steps that fail one after another before every request ends: nobody waits for ever


class Worker:
    """Makes an engine's steps in a thread of its own, as long as there are requests, and tells who waits for tokens.

    Args:
        engine: which nobody else steps meanwhile.

    Attributes:
        gauges: the engine's numbers after its last step.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._requests: set[Request] = set()
        self._events: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._wake, self._lock = threading.Event(), threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="ssmzoo-engine", daemon=True)
        self._look()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests and the thread, after the step that is under way."""
        self.cut(RuntimeError("the server has stopped"))
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, prompt: list[int], **options: Any) -> Request:
        """As :meth:`ssmzoo.Engine.submit`; any thread may call this."""
        request = self.engine.submit(prompt, **options)
        with self._lock:
            self._requests.add(request)
        self._wake.set()
        return request

    def cut(self, error: Exception) -> None:
        """Ends all requests with an error."""
        with self._lock:
            requests = list(self._requests)
        for request in requests:
            request.fail(error)
        self._wake.set()
        self._tell()

    def wake(self) -> None:
        """Lets the engine see that requests were cancelled."""
        self._wake.set()

    @contextlib.contextmanager
    def telling(self, event: asyncio.Event) -> Iterator[None]:
        """Sets an event of the running loop after each step."""
        with self._lock:
            self._events[event] = asyncio.get_running_loop()
        try:
            yield
        finally:
            with self._lock:
                del self._events[event]

    def _work(self) -> None:
        failed = 0
        while not self._stopping:
            self._wake.clear()
            try:
                busy, failed = self.engine.step(), 0
            except Exception as error:
                busy, failed = True, failed + 1
                logging.getLogger(__name__).exception("a step of the engine failed")
                if failed == TRIES:
                    self.cut(RuntimeError(f"the engine failed with {type(error).__name__}"))
            with self._lock:
                self._requests = {request for request in self._requests if not request.done}
            self._look()
            self._tell()
            if not busy:
                self._wake.wait()

    def _look(self) -> None:
        engine = self.engine
        self.gauges = {
            "active": engine.active,
            "waiting": engine.waiting,
            "bytes": engine.nbytes,
            "memory": engine.memory,
            "swaps": engine.swaps,
            "proposed": engine.proposed,
            "kept": engine.kept,
        }

    def _tell(self) -> None:
        with self._lock:
            events = list(self._events.items())
        for loop in {loop for _, loop in events}:  # one call for all: each wakes the loop's thread
            waiting = [event for event, its in events if its is loop]
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_set_all, waiting)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
