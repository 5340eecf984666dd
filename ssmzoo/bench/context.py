"""What several processes bring: a layer whose sequence is cut over two of them, and a context of a million tokens.

All processes are on this machine and have one thread each. They share its memory's bandwidth, so that two of them never
take half the time of one, however little they wait for each other. The line of two processes that do not know each
other, with a sequence each, shows how much that is; those of gradients that are added up, and of a cut sequence, are
beside both.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ssmkernels.bench import BOTH, Contest, Contestant, Measurement, Plan, refusal
from ssmkernels.bench.contest import blank
from ssmkernels.bench.resident import Resident
from ssmzoo.bench.ranks import together

KIND = "context"
DEFAULT = ("mamba", "mamba2", "mamba3", "gated_deltanet", "mlstm", "attention", "million-mamba", "million-hybrid")
SIZES = {"d_model": 256, "length": 8192}
LAYERS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {},
    "mamba3": {},
    "gated_deltanet": {"n_heads": 2, "head_dim": 128},
    "mlstm": {},
    "attention": {"head_dim": 64},
}
HYBRID = {
    "gated_deltanet": {"n_heads": 2, "head_dim": 16},
    "local": {"kind": "attention", "head_dim": 16, "window": 256},
}
MODELS: dict[str, dict[str, Any]] = {
    "million-mamba": {"pattern": ["mamba"], "mixers": {"mamba": {}}},
    "million-hybrid": {"pattern": ["gated_deltanet", "local"], "mixers": HYBRID},
}
SMALL_MODEL = {"d_model": 32, "n_layers": 2, "vocab_size": 16}
MILLION, RANKS = 1_048_576, 4
ONE, APART = "1 process", "2 processes, apart"
EACH, CUT = "2 processes, a sequence each", "2 processes, the sequence cut"
FORCED = {"attention": ("ring", "balanced")}  # ways over the cut, beside the one that the call takes by itself


def bench_context(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times a layer on one process and on two, or runs a model over a long context on four.

    The limit of a line is the time of one process over the processes that share the work. A model's memory on each of
    four processes is beside that of one alone, which a line through three shorter lengths gives.
    """
    if plan.device.type != "cpu" or plan.dtype != torch.float32:
        yield [refusal(KIND, name, "ssmzoo", "ours", "processes are measured on a CPU, in float32", plan)]
    elif name in LAYERS:
        yield _layer(name, plan)
    else:
        yield _million(name, plan)


def _layer(name: str, plan: Plan) -> list[Measurement]:
    sizes: dict[str, Any] = {**SIZES, **({"length": 1024} if plan.quick else {}), **plan.changes}
    plan.say(f"{name}: {sizes['length']} tokens on one and two processes")
    seconds = together(2, layer_times, name, sizes["d_model"], sizes["length"], plan.seconds)[0]
    one = statistics.median(seconds[ONE])
    shape = f"1 x {sizes['length']}, d_model {sizes['d_model']}"
    rows = []
    apart = statistics.median(seconds[APART])
    for what in seconds:
        sequences = 2 if what in (APART, EACH) else 1
        row = _timed(name, what, shape, seconds[what], one if what == ONE else one * sequences / 2, plan)
        rate = sequences * sizes["length"] / (row.median or 1)
        ratio = apart * sequences / 2 / (row.median or 1)
        note = f"{ratio:.2f} of the rate of two processes apart" if what not in (ONE, APART) else ""
        rows.append(dataclasses.replace(row, tokens_per_second=rate, note=note))
    return rows


def layer_times(group: dist.ProcessGroup, name: str, d_model: int, length: int, seconds: float) -> dict[str, Any]:
    """Seconds of forward and backward passes in each way, which take turns."""
    import ssmzoo
    from ssmzoo import parallel

    torch.manual_seed(0)
    layer = ssmzoo.build_mixer(name, d_model, **LAYERS[name])
    copied = DistributedDataParallel(copy.deepcopy(layer), process_group=group)
    cuts: dict[str, Any] = {CUT: None} | {f"{CUT}, {how}": how for how in FORCED.get(name, ())}
    models = {what: parallel.context(layer, group, reduce_gradients=True, how=how) for what, how in cuts.items()}
    x = torch.randn(1, length, d_model)
    half = x.tensor_split(2, dim=1)[group.rank()].clone()

    def alone() -> None:
        layer(x.requires_grad_()).sum().backward()

    def each() -> None:
        copied(x.requires_grad_()).sum().backward()

    def both(model: parallel.Context) -> None:
        model(half.requires_grad_()).sum().backward()

    ways: dict[str, Callable[[], None]] = {ONE: alone, APART: alone, EACH: each}
    ways |= {what: functools.partial(both, model) for what, model in models.items()}
    found: dict[str, list[float]] = {what: [] for what in ways}
    for turn in range(1 + max(3, min(20, round(5 * seconds)))):
        for what, way in ways.items():
            for gradients in (layer, copied):
                gradients.zero_grad()
            x.grad = half.grad = None
            dist.barrier(group)
            start = time.perf_counter()
            if what != ONE or group.rank() == 0:
                way()
            dist.barrier(group)
            if turn >= 1:
                found[what].append(time.perf_counter() - start)
    return found


def _million(name: str, plan: Plan) -> list[Measurement]:
    length = plan.changes.get("length", MILLION // 64 if plan.quick else MILLION)
    memory = {}
    for shorter in (length // 32, length // 16, length // 8):
        plan.say(f"{name}: memory of one process at {shorter} tokens")
        memory[shorter] = together(1, long_run, name, shorter)[0][1]
    slope, offset = statistics.linear_regression(list(memory), list(memory.values()))
    one = slope * length + offset
    plan.say(f"{name}: {length} tokens on {RANKS} processes")
    found = together(RANKS, long_run, name, length)
    most, seconds = max(memory for _, memory in found), max(seconds for seconds, _ in found)
    shape = f"1 x {length}, d_model {SMALL_MODEL['d_model']}"
    row = _timed(name, f"{RANKS} processes", shape, [seconds], None, plan)
    note = f"memory of a process: {most / one:.2f} of one alone ({one / 2**20:.0f} MiB by a line through shorter runs)"
    return [dataclasses.replace(row, resident_bytes=most, tokens_per_second=length / seconds, note=note)]


def long_run(group: dist.ProcessGroup, name: str, length: int) -> tuple[float, int]:
    """Seconds and peak bytes of one forward and backward pass of this process's part."""
    import ssmzoo
    from ssmzoo import parallel

    torch.manual_seed(0)
    model = ssmzoo.build(SMALL_MODEL | MODELS[name])
    cut = parallel.context(model, group, reduce_gradients=True)
    few = torch.zeros(1, 64, dtype=torch.int64)
    cut(few).sum().backward()  # what a first call sets up
    model.zero_grad()
    ids = torch.randint(0, 16, (1, length)).tensor_split(group.size(), dim=1)[group.rank()].clone()
    resident, start = Resident(), time.perf_counter()
    (cut(ids).logsumexp(-1).sum() / length).backward()
    return time.perf_counter() - start, resident.grown()


def _timed(name: str, how: str, shape: str, seconds: list[float], limit: float | None, plan: Plan) -> Measurement:
    row = blank(Contest(KIND, name, BOTH, shape, ()), plan, Contestant(how, "ours", dict))
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
    row = dataclasses.replace(row, median=median, low=low, high=high, samples=len(seconds))
    if limit is None:
        return row
    return dataclasses.replace(row, limit=limit, limited_by=ONE, of_limit=median / limit)
