"""Times in alternation, peak memory, and how either grows."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ssmkernels.core.memory import blocks_apart

T = TypeVar("T")

LEAST, MOST = 3, 50  # samples of one contestant
SLOW = 10  # times the seconds that a contestant has: from there on, two samples must do
ENDLESS = 10.0  # seconds of a call from which on one must do, whatever the seconds that a contestant has
SHORTEST = 2e-3  # seconds that a sample usually lasts at least: quicker calls are repeated within it
CACHE = 2**28  # bytes; more than any GPU's caches hold


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one for each sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def compete(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    shortest: float = SHORTEST,
    before: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Times functions against one another: they run by turns, so that what slows the machine down slows all of them.

    Each is called once to warm up, then about as often as fits into ``seconds``, and at least three times. Where the
    call that warms up alone takes longer than ``seconds`` it counts; where it takes ten times that, one more is enough.
    Whose call from ``before`` took :data:`ENDLESS` seconds is not called again: that one is its only sample.

    Args:
        calls: name → what is timed.
        device: where it computes: its work is waited for. On a GPU its caches are emptied before each call.
        seconds: for each of them, about.
        shortest: seconds that a sample lasts at least.
        before: seconds that a call of each took already, by name; without those that are not known.
    """
    watch = stopwatch(torch.device(device))
    endless = {name: taken for name, taken in (before or {}).items() if taken >= ENDLESS and name in calls}
    first = {name: watch(call, 1) for name, call in calls.items() if name not in endless}
    samples = {name: [taken] if taken > seconds else [] for name, taken in first.items()}
    repeats = {name: max(1, math.ceil(shortest / max(taken, 1e-9))) for name, taken in first.items()}
    counts = {}
    for name, taken in first.items():
        least = 1 if taken > SLOW * seconds else LEAST - len(samples[name])
        counts[name] = min(MOST, max(least, round(seconds / (taken * repeats[name]))))
    for name in schedule(counts):
        samples[name].append(watch(calls[name], repeats[name]))
    samples |= {name: [taken] for name, taken in endless.items()}
    return {name: Timing(tuple(samples[name])) for name in calls}


def schedule(counts: Mapping[str, int]) -> Iterator[str]:
    """Whose turn it is. Who has fewer samples is spread evenly; each round starts with another, for fairness."""
    names = list(counts)
    rounds = max(counts.values(), default=0)
    for r in range(rounds):
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            if (r + 1) * counts[name] // rounds > r * counts[name] // rounds:
                yield name


def stopwatch(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """A function that makes so many calls and gives the seconds that one took.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA GPU.
    """
    if device.type == "cpu":

        def on_cpu(call: Callable[[], object], repeats: int) -> float:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats

        return on_cpu
    if device.type != "cuda":
        raise ValueError(f"bench: `device` must be cpu or cuda; got {str(device)!r}")
    flushed = torch.empty(CACHE, dtype=torch.uint8, device=device)

    def on_gpu(call: Callable[[], object], repeats: int) -> float:
        total = 0.0
        with torch.cuda.device(device):  # whose stream the events go to
            for _ in range(repeats):
                flushed.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize(device)
                total += start.elapsed_time(end) / 1e3
        return total / repeats

    return on_gpu


def peak_memory(call: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, int]:
    """What a call returns, and the most bytes of tensors that were alive at once beyond those from before.

    Results count. On a CPU PyTorch's allocator is watched: memory that a kernel takes past it is not seen.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes to standard error each time it starts
    with blocks_apart(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        alive += change
        peak = max(peak, alive)
    return result, peak


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of the power law values ∝ sizes^p that fits best: the slope of the line through the logarithms.

    Raises:
        ValueError: fewer than two different sizes, or a number that has no logarithm.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values) or min(*sizes, *values) <= 0:
        raise ValueError(
            f"exponent: `sizes` and `values` must be two or more positive numbers each; got {sizes} and {values}"
        )
    slope, _ = statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values])
    return slope
