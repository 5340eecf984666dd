"""Transfers between two processes, started now and waited for later."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from ssmzoo.parallel.line import Line

To = tuple[Tensor, int]  # a tensor, and the process that it goes to or comes from


def transfer(line: Line, sends: list[To], comes: list[To]) -> Callable[[], None]:
    """Starts to send and to receive, and gives what waits for it; empty tensors are left out on both sides.

    Between two processes tensors have to be in the same order on both.
    """
    calls = [
        dist.P2POp(operation, x, line.peer(rank), line.group)
        for operation, tensors in ((dist.isend, sends), (dist.irecv, comes))
        for x, rank in tensors
        if x.numel()
    ]
    works = dist.batch_isend_irecv(calls) if calls else []

    def wait() -> None:
        for work in works:
            work.wait()
        calls.clear()  # which keep what is sent alive until here

    return wait
