"""Times ``ssd`` beside ``selective_scan`` on one recurrence, by state size; prints rows of the table in docs/ssd.md."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssmkernels import selective_scan, ssd

L, H, P = 2048, 24, 64
RUNS = 4


def passes(n: int) -> dict[str, Callable[[], Tensor]]:
    """A call of each op, whose arguments want gradients."""
    x, dt = torch.randn(1, L, H, P), torch.randn(1, L, H) - 4
    A, B, C = -torch.rand(H) - 0.1, torch.randn(1, L, 1, n), torch.randn(1, L, 1, n)
    dual = [t.requires_grad_() for t in (x, dt, A, B, C)]
    wide = (x.flatten(2), dt.repeat_interleave(P, 2), A.repeat_interleave(P)[:, None].expand(-1, n), B, C)
    scan = [t.detach().clone().requires_grad_() for t in wide]
    return {
        "ssd": lambda: ssd(*dual, dt_softplus=True),
        "scan": lambda: selective_scan(*scan, delta_softplus=True),
    }


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


for n in (1, 8, 16, 32, 64, 128):
    calls, times = passes(n), {}
    for run in range(RUNS + 1):
        for name, call in calls.items():
            with torch.no_grad():
                forward = milliseconds(call)
            both = milliseconds(lambda: call().sum().backward())  # noqa: B023
            if run > 0:
                times.setdefault((name, "forward"), []).append(forward)
                times.setdefault((name, "both"), []).append(both)
    medians = {key: statistics.median(found) for key, found in times.items()}
    order = [(name, part) for part in ("forward", "both") for name in calls]
    print(f"| {n} | " + " | ".join(f"{medians[key]:.3g}" for key in order) + " |")
