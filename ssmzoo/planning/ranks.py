"""Processes on this machine that each run the same function with one thread, connected by gloo."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

SECONDS = 600  # that a process waits for another


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` on so many new processes of one default group; what each returns.

    Raises:
        ChildProcessError: a process failed; with its rank and its error.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers = context.SimpleQueue()
        store = Path(folder) / "store"
        processes = [
            context.Process(target=_work, args=(answers, store, rank, ranks, function, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        try:
            for _ in range(ranks):
                rank, value, error = answers.get()
                if error:
                    raise ChildProcessError(f"rank {rank} of {ranks}: {error}")
                found[rank] = value
        finally:
            for process in processes:
                process.join(0 if len(found) < ranks else 10)
                process.terminate()
                process.join()
    return [found[rank] for rank in range(ranks)]


def _work(answers: Any, store: Path, rank: int, ranks: int, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(ranks)
    try:
        timeout = datetime.timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
        answers.put((rank, function(*args), None))
    except Exception as error:
        answers.put((rank, None, f"{type(error).__name__}: {error}"))
    else:
        dist.destroy_process_group()
