"""What this machine can do at best: how fast it copies, and how fast it multiplies matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssmkernels.bench.measure import stopwatch

COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes, far beyond any cache
LARGEST = {"cpu": 2048, "cuda": 8192}  # rows and columns of the largest matrices that are multiplied
TRIES = 5


@dataclass(frozen=True)
class Limits:
    """The best that was measured.

    Attributes:
        bandwidth: bytes a second of a copy, those read and those written.
        flops: floating-point operations a second of a matrix product.
    """

    bandwidth: float
    flops: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for so many operations and so many bytes, each done while the other is."""
        return max(flops / self.flops, nbytes / self.bandwidth)

    def which(self, flops: float, nbytes: float) -> str:
        """Which of the two it is."""
        return "matrix rate" if flops / self.flops > nbytes / self.bandwidth else "bandwidth"


def measure_limits(device: torch.device | str, dtype: torch.dtype, *, quick: bool = False) -> Limits:
    """Measures both, in about a second; ``quick`` with less memory and smaller matrices."""
    device = torch.device(device)
    watch = stopwatch(device)
    size = COPIED[device.type] // (4 if quick else 1)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(watch(lambda: target.copy_(source), 1) for _ in range(TRIES))
    best = 0.0
    n = 512
    while n <= LARGEST[device.type] // (2 if quick else 1):
        a = torch.randn(n, n, device=device, dtype=dtype)
        b = torch.randn(n, n, device=device, dtype=dtype)
        taken = min(watch(lambda a=a, b=b: torch.mm(a, b), 1) for _ in range(TRIES))  # type: ignore[misc]
        best = max(best, 2 * n**3 / taken)
        n *= 2
    return Limits(2 * size / copy, best)
