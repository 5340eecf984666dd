"""Tasks over processes. A process that dies ends the work with an error; none outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from ssmzoo.interrupts import deaf, starting

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
    if method == "forkserver":
        context.set_forkserver_preload([__name__, work.__class__.__module__])
    left = iter(tasks)
    processes: dict[Any, Any] = {}  # by their connections
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            with starting():
                process.start()
                processes[ours] = process
            theirs.close()
            ours.send(next(left))
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
    deaf()
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
