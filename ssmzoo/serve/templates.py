"""A chat template, rendered in a process of its own, which is ended where it takes too long."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from typing import Any

from ssmzoo.serve import _render

SECONDS = 5  # for a conversation
START = 60  # for the process to begin, on a busy machine
MEMORY = 2**30  # bytes
CHARACTERS = 2**22


class TemplateError(Exception):
    """A template that takes no such conversation."""


class EndlessTemplateError(Exception):
    """A template that took too long."""


class ChatTemplate:
    """Jinja's templates as tokenizers have them, with ``raise_exception`` and ``strftime_now``. Any thread may render.

    Args:
        source: the template.

    Raises:
        TemplateError: no valid template.
        EndlessTemplateError: one that does not come to an end while it is compiled.
    """

    def __init__(self, source: str):
        self.source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        with self._lock:
            self._start()

    def render(self, **values: Any) -> str:
        """The text.

        Raises:
            TemplateError: the template refuses the values.
            EndlessTemplateError: it took longer than ``SECONDS``, or another call before this one did.
        """
        if not self._lock.acquire(timeout=SECONDS + START):
            raise EndlessTemplateError("is busy with other conversations")
        try:
            if self._process is not None and self._process.poll() is not None:  # ended by somebody else meanwhile
                self._drop()
            if self._process is None:
                self._start()
            return self._ask(values, SECONDS)
        finally:
            self._lock.release()

    def _start(self) -> None:
        bounds = map(str, (SECONDS, MEMORY, CHARACTERS))
        self._process = subprocess.Popen(
            [sys.executable, _render.__file__, *bounds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._ask(self.source, START)

    def _drop(self) -> None:
        """Ends the process; the next conversation begins another."""
        self._finalizer()
        self._process = None

    def _ask(self, given: Any, seconds: float) -> str:
        """The text for a line; the process ends where it does not come in time."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps(given) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it has ended
            line = ""
        except BaseException:  # an interrupt, say: what it answers yet would be taken for the next one's
            self._drop()
            raise
        finally:
            timer.cancel()
        if not line:
            self._drop()
            if late.is_set():
                raise EndlessTemplateError(f"took longer than {seconds:g} seconds")
            raise TemplateError(f"its process ended with status {process.returncode}")
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        text: str = answer["text"]
        return text


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and lets go of its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left to write has nobody to read it
                pipe.close()
