"""Processes on this machine that each run the same function with one thread, connected by gloo."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from ssmzoo.interrupts import deaf, starting

SECONDS = 600  # that a process waits for another


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` on so many new processes of one default group; what each returns.

    Raises:
        ChildProcessError: a process failed, or was killed; with its rank and its error. All are ended.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store, started = Path(folder) / "store", dict[Any, tuple[int, Any]]()
        found: dict[int, Any] = {}
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, store, rank, ranks, function, args), daemon=True)
                with starting():
                    process.start()
                    started[ours] = rank, process
                theirs.close()  # so that the end of the process is heard
            while len(found) < ranks:
                found |= _answers({c: of for c, of in started.items() if of[0] not in found}, ranks)
        finally:
            for _, process in started.values():
                process.join(0 if len(found) < ranks else 10)
                process.terminate()
                process.join()
    return [found[rank] for rank in range(ranks)]


def _answers(waiting: Mapping[Any, tuple[int, Any]], ranks: int) -> dict[int, Any]:
    """What those ranks return that are the next to do so."""
    found = {}
    ready: Any = wait(list(waiting))
    for connection in sorted(ready, key=lambda one: waiting[one][1].exitcode or 0):  # who was killed before who lost it
        rank, process = waiting[connection]
        try:
            value, error = connection.recv()
        except EOFError:
            process.join()
            error = f"it ended with status {process.exitcode} and no answer, perhaps for want of memory"
        if error:
            raise ChildProcessError(f"rank {rank} of {ranks}: {error}")
        found[rank] = value
    return found


def _work(answers: Connection, store: Path, rank: int, ranks: int, function: Callable[..., Any], args: Any) -> None:
    deaf()
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(ranks)
    try:
        timeout = datetime.timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
        answers.send((function(*args), None))
    except Exception as error:
        answers.send((None, f"{type(error).__name__}: {error}"))
    else:
        dist.destroy_process_group()
