"""Processes of torch.distributed that stay for many tests, on gloo."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "ssmzoo.parallel"]  # imported once; the processes are then copies


class Ranks:
    """Some processes, the first few of which run a function together."""

    def __init__(self, connections: list[Connection]):
        self.connections = connections

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(group, *args)`` on the first so many; what each returns. Its module must be importable.

        Raises:
            AssertionError: with the traceback of each process that failed.
        """
        for connection in self.connections:
            connection.send((ranks, function, args))
        answers = [connection.recv() for connection in self.connections[:ranks]]
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        assert not failures, "\n".join(failures)
        return [found for _, found in answers]


@contextmanager
def ranks(most: int) -> Iterator[Ranks]:
    """So many processes, until the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(most)]
        processes = [
            context.Process(target=_work, args=(theirs, Path(folder) / "store", rank, most), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            yield Ranks([ours for ours, _ in pipes])
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _work(connection: Connection, store: Path, rank: int, most: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=most, timeout=timeout)
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, most + 1)}
    while True:
        ranks, function, args = connection.recv()
        if rank < ranks:
            try:
                connection.send((None, function(groups[ranks], *args)))
            except Exception:
                connection.send((traceback.format_exc(), None))
