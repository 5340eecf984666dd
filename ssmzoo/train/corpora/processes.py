"""Tasks over processes. A process that dies ends the work with an error; none outlives the one that started it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def over_processes(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """The results of ``work`` on each task, as they are done.

    Args:
        work: can be pickled; with one worker it runs in this process.
        tasks: likewise.
        workers: processes.

    Raises:
        RuntimeError: a process was killed.
        Exception: what ``work`` raised.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(work, tasks)
        return
    # A server that is forked from has imported everything once, so the processes share this memory.
    method: Any = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    starting: Any = contextlib.nullcontext if method == "forkserver" else _deaf
    if method == "forkserver":
        from multiprocessing import forkserver

        context.set_forkserver_preload([__name__, work.__class__.__module__])
        with _deaf():
            forkserver.ensure_running()
    left = iter(tasks)
    processes: dict[Any, Any] = {}  # by their connections
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            with starting():
                process.start()
            theirs.close()
            ours.send(next(left))
            processes[ours] = process
        while processes:
            ready: Any = wait(list(processes))
            for connection in ready:
                yield _result(connection, processes[connection])
                try:
                    connection.send(next(left))
                except StopIteration:
                    connection.close()
                    processes.pop(connection).join()
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """What is started inside does not hear Ctrl-C, not even while it imports: whoever started it ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _result(connection: Any, process: Any) -> Any:
    try:
        good, result = connection.recv()
    except (EOFError, OSError):
        process.join()
        raise RuntimeError(
            f"a process ended with status {process.exitcode} amid its work, perhaps for want of memory: call again "
            "with fewer --workers, and the rest will be done"
        ) from None
    if not good:
        raise result
    return result


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result = (True, work(task))
        except Exception as error:
            result = (False, error)
        try:
            connection.send(result)
        except OSError:  # nobody waits for it
            return
