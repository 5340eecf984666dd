"""Processes of torch.distributed on this machine, on gloo, each with one thread."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ssmzoo.interrupts import deaf, starting


def together(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(group, *args)`` on so many new processes; what each returns. It must be importable.

    Raises:
        RuntimeError: one of them failed, or ended without an answer; all are ended.
    """
    method: Any = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload(["torch.distributed", function.__module__])  # once for all of them
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        started: list[tuple[Any, Connection]] = []
        answers: list[Any] = []
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, store, rank, ranks, function, args), daemon=True)
                with starting():
                    process.start()
                    started.append((process, ours))
                theirs.close()
            answers += (_answer(rank, connection) for rank, (_, connection) in enumerate(started))
        finally:
            for process, _ in started:
                process.join(5 if len(answers) == ranks else 0)
                process.terminate()
    return answers


def _answer(rank: int, connection: Connection) -> Any:
    try:
        found, error = connection.recv()
    except EOFError:
        raise RuntimeError(f"process {rank} ended without an answer; it may have run out of memory") from None
    if error:
        raise RuntimeError(f"process {rank}: {error}")
    return found


def _work(
    connection: Connection, store: Path, rank: int, ranks: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    deaf()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        connection.send((function(dist.group.WORLD, *args), None))
        dist.destroy_process_group()
    except Exception:
        connection.send((None, traceback.format_exc()))
