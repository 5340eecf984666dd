"""How long a call takes while all ranks make it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ssmkernels.bench.measure import SHORTEST

TRIES = 7


def seconds(call: Callable[[], object]) -> float:
    """The median of some samples of at least a few milliseconds; the ranks begin the first together."""
    call()
    start = time.perf_counter()
    call()
    repeats = torch.tensor([max(1.0, SHORTEST // max(time.perf_counter() - start, 1e-6))])
    dist.all_reduce(repeats, dist.ReduceOp.MAX)
    taken = []
    for _ in range(TRIES):
        start = time.perf_counter()
        for _ in range(int(repeats)):
            call()
        taken.append((time.perf_counter() - start) / int(repeats))
    return statistics.median(taken)
