"""What threads cost on a busy machine: a busy process on each core, and calls on one thread and on several by turns.

A program that waits for a thread without a core loses more than threads bring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmkernels.bench import BOTH, FORWARD, Contest, Contestant, Measurement, Plan, clock, refusal
from ssmkernels.bench.ops import Admitted, checked_rows, fails, make, real_use
from ssmkernels.bench.ops import contest_of as contest_of_op
from ssmkernels.bench.peers import peers_of, setting_of
from ssmkernels.bench.terms import Results
from ssmkernels.check.spec import spec_of, specs
from ssmkernels.core.dispatch import explain
from ssmzoo.bench import mixers, models
from ssmzoo.bench.peers import MIXERS, rivals
from ssmzoo.registry import list_mixers

KIND = "busy"
DEFAULT = ("mamba_step", "decode_attention", "mamba", "attention", "mamba-130m", "mamba-hybrid-tiny")
SAMPLE = 0.05  # seconds of a sample at least: several turns of the system's scheduler, a few milliseconds each
ONE = "the same on one thread"

# Works until its parent has ended, in whatever way.
BUSY = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
parent = int(sys.argv[2])
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


def bench_busy(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times an op, a mixer (a whole sequence, with and without gradients, and one token) or a model (one token).

    Each, and its peers, is timed on one thread and on as many as PyTorch has, beside a busy process on each core. In a
    line of several threads ``limit`` is the time of the same on one, so that ``of_limit`` says what threads cost or
    bring. With gradients only ours is timed: peers take half a minute a call.
    """
    most = torch.get_num_threads()
    if plan.device.type != "cpu" or most < 2:
        why = "PyTorch has one thread (OMP_NUM_THREADS)" if most < 2 else "only calls on a CPU have threads"
        yield [refusal(KIND, name, "ssmzoo", "ours", why, plan)]
        return
    torch.set_num_threads(1)  # checks take much longer where threads wait for each other
    try:
        for rows, contest in _contests(name, plan):
            if rows:
                yield rows
            if contest is not None:
                yield on_busy_cores(contest, plan, most)
    finally:
        torch.set_num_threads(most)


def on_busy_cores(contest: Contest, plan: Plan, most: int) -> list[Measurement]:
    """Times contestants that come in pairs: the first of each pair on one thread, the second on ``most``."""
    told = {1: "1 thread", most: f"{most} threads"}
    pairs = zip(contest.contestants[::2], contest.contestants[1::2], strict=True)
    everyone = [
        dataclasses.replace(one, name=f"{one.name}, {told[count]}", call=_on(count, one.call))
        for pair in pairs
        for one, count in zip(pair, told, strict=True)
    ]
    pairwise = dataclasses.replace(contest, kind=KIND, contestants=everyone, limit=None, limited_by="")
    try:
        with busy():
            rows = clock(pairwise, dataclasses.replace(plan, shortest=SAMPLE))
    finally:
        torch.set_num_threads(1)
    return [row for pair in zip(rows[::2], rows[1::2], strict=True) for row in _over_one(*pair)]


@contextlib.contextmanager
def busy() -> Iterator[Sequence[int]]:
    """A process that does nothing but work on each core that this one may use; gives the cores."""
    able = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if able else list(range(os.cpu_count() or 1))
    parent = str(os.getpid())
    started = []
    try:
        for core in cores:
            started.append(subprocess.Popen([sys.executable, "-c", BUSY, str(core), parent]))
        yield cores
    finally:
        for process in started:
            process.kill()
            process.wait()


def _contests(name: str, plan: Plan) -> Iterator[tuple[list[Measurement], Contest | None]]:
    """Those that cannot take part, and the contests of everything with this name; each contestant is in twice."""
    if name in specs():
        yield from _of_op(name, plan)
    if name in list_mixers():
        yield from _of_mixer(name, plan)
    if name not in specs() and name not in list_mixers():
        yield from models.contests(name, plan, (models.DECODING,), kind=KIND, copies=2)


def _of_op(op: str, plan: Plan) -> Iterator[tuple[list[Measurement], Contest | None]]:
    spec, setting = spec_of(op), setting_of(op)
    case = real_use(spec, setting, plan)
    rows = checked_rows(spec, setting, case)
    chosen = explain(spec.function(), **make(spec, setting, case, plan.dtype, plan.device)).chosen
    why = fails(op, chosen, rows, plan)
    if why:
        yield [refusal(KIND, op, chosen, "ours", why, plan)], None
        return
    everyone: Admitted = [(Contestant(chosen, "ours", dict), functools.partial(spec.function(), implementation=chosen))]
    for peer in peers_of(op, "cpu") if plan.peers else ():
        why = peer.package.missing or fails(op, peer, rows, plan)
        if why:
            yield [refusal(KIND, op, peer.name, "peer", why, plan)], None
        else:
            everyone.append((Contestant(peer.name, "peer", dict, peer.note), peer.function))
    twice = [one for one in everyone for _ in range(2)]
    yield [], contest_of_op(spec, setting, case, FORWARD, twice, plan)


def _of_mixer(name: str, plan: Plan) -> Iterator[tuple[list[Measurement], Contest | None]]:
    mixer, sizes, told, why = mixers.prepared(name, plan)
    if mixer is None:
        yield [refusal(KIND, name, "ssmzoo", "ours", why, plan)], None
        return
    twins, refused = rivals(KIND, name, mixer, MIXERS.get(name, ()), plan)
    yield refused, None
    for work, others in ((FORWARD, twins), (BOTH, [])):
        whole = mixers.contest_of(name, mixer, others, sizes, told, work, plan)
        players = [one for one in whole.contestants if one.role in ("ours", "peer") for _ in range(2)]
        yield [], dataclasses.replace(whole, contestants=players)
    if mixer.causal:
        x = torch.randn(sizes["batch"], 1, sizes["d_model"], dtype=plan.dtype)
        shape = ", ".join(f"{key} {value}" for key, value in sizes.items() if key != "length") + told
        players = [Contestant("ssmzoo", "ours", _recorded(_decoder(mixer, len(x)), x)) for _ in range(2)]
        for peer, note, twin in twins:
            if twin.decoder is not None:
                players += [Contestant(peer, "peer", _recorded(twin.decoder(), x), note) for _ in range(2)]
        yield [], Contest(KIND, name, models.DECODING, shape, players, tokens=sizes["batch"])


def _decoder(mixer: Any, batch: int) -> Callable[[Tensor], Tensor]:
    """Reads one more token at each call."""
    state = mixer.initial_state(batch, max_length=models.ROOM)

    def call(x: Tensor) -> Tensor:
        nonlocal state
        y, state = mixer(x, state)
        return y

    return call


def _recorded(decoder: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Results]:
    def call() -> Results:
        with torch.no_grad():
            return {"y": decoder(x)}

    return call


def _on(threads: int, call: Callable[[], Results]) -> Callable[[], Results]:
    def run() -> Results:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return call()

    return run


def _over_one(one: Measurement, many: Measurement) -> tuple[Measurement, Measurement]:
    if one.median is None or many.median is None:
        return one, many
    return one, dataclasses.replace(many, limit=one.median, limited_by=ONE, of_limit=many.median / one.median)
