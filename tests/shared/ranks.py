"""Processes of torch.distributed that stay for many tests, on gloo."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Imported once, with what training imports at its first step and at its first figure; the processes are then copies.
PRELOAD = ["torch.utils.checkpoint", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel", "ssmzoo.parallel"]
PRELOAD += ["ssmzoo.train.mesh.trainer", "accelerate", "matplotlib.backends.backend_agg"]


class Ranks:
    """Some processes, the first few of which run a function together. They start anew once one has failed."""

    def __init__(self, most: int):
        self.most = most
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(group, *args)`` on the first so many; what each returns. Its module must be importable.

        Raises:
            AssertionError: with the traceback of each process that failed.
        """
        if not self.processes:
            self._start()
        for connection in self.connections[:ranks]:
            connection.send((ranks, function, args))
        answers = [connection.recv() for connection in self.connections[:ranks]]
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        if failures:
            self.stop()
        assert not failures, "\n".join(failures)
        return [found for _, found in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        store = Path(self.folder.name) / "store"
        for rank in range(self.most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, store, rank, self.most), daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def stop(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.terminate()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.connections = [], []


def _work(connection: Connection, store: Path, rank: int, most: int) -> None:
    import torch
    import torch.distributed as dist

    gc.collect()
    gc.freeze()  # or each measurement of memory would look through all modules
    gc.set_threshold(10_000, 20, 50)
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=most, timeout=timeout)
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, most + 1)}
    while True:
        ranks, function, args = connection.recv()
        try:
            connection.send((None, function(groups[ranks], *args)))
        except Exception:
            connection.send((traceback.format_exc(), None))
