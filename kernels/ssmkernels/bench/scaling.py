"""How one of our ops scales: with the length, with threads, and how much memory it takes at a long length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ssmkernels.bench.contest import blank, first_line, grow, hold, refusal
from ssmkernels.bench.ops import checked_rows, contest_of, fails, lengths_of, make, real_use, shape
from ssmkernels.bench.peers import Setting, setting_of
from ssmkernels.bench.resident import resident_memory
from ssmkernels.bench.terms import BOTH, FORWARD, Contest, Contestant, Measurement, Plan, Results
from ssmkernels.check.spec import Case, Spec, spec_of
from ssmkernels.core.dispatch import explain

KIND = "scaling"
SHORT, QUICK_LONG = 1024, 256
FACTOR = 4  # from one length to the next
RESIDENT = "peak of the whole process above inputs and results, in a process of its own"

Function = Callable[..., Any]


def scale_op(op: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times an op's fastest implementation at lengths from 1024 to its long one, then on one thread and on all.

    On one thread it must give the same bits. At the long length the memory of a process that does nothing else is
    measured. Gives the lines of one after the other.

    Raises:
        ValueError: no such op.
    """
    spec, setting = spec_of(op), setting_of(op)
    case = real_use(spec, setting, plan)
    names = lengths_of(case)
    if not names:
        yield [refusal(KIND, op, "ssmzoo", "ours", "it has no length", plan)]
        return
    name = explain(spec.function(), **make(spec, setting, case, plan.dtype, plan.device)).chosen
    why = fails(op, name, checked_rows(spec, setting, case), plan)
    if why:
        yield [refusal(KIND, op, name, "ours", why, plan)]
        return
    function = functools.partial(spec.function(), implementation=name)
    work = BOTH if spec.differentiable and setting.backward else FORWARD
    longest = plan.changes.get(names[0], QUICK_LONG if plan.quick else setting.long)
    cases = {length: {**case, **dict.fromkeys(names, length)} for length in lengths_to(longest)}
    admitted: list[tuple[Contestant, Function]] = [(Contestant(name, "ours", dict), function)]
    contests = (contest_of(spec, setting, one, work, admitted, plan, length) for length, one in cases.items())
    yield from grow((dataclasses.replace(contest, kind=KIND) for contest in contests), plan)
    if plan.device.type != "cpu":
        return
    for passes in dict.fromkeys((FORWARD, work)):
        yield by_threads(spec, setting, cases[sorted(cases)[1]], passes, name, function, plan)
    yield [memory(spec, setting, cases[longest], work, name, plan)]


def lengths_to(longest: int) -> list[int]:
    """Two lengths or more, each four times the one before, the last as far as it must be: 1024, 4096, ..."""
    if longest < FACTOR:
        raise ValueError(f"scaling: `length` must be at least {FACTOR}; got {longest}")
    lengths = [min(SHORT, longest // FACTOR)]
    while lengths[-1] * FACTOR < longest:
        lengths.append(lengths[-1] * FACTOR)
    return [*lengths, longest]


def by_threads(
    spec: Spec, setting: Setting, case: Case, work: str, name: str, function: Function, plan: Plan
) -> list[Measurement]:
    """The same call on one thread and on as many as PyTorch has, if that gives the same bits."""
    most = torch.get_num_threads()
    if most < 2:
        return [refusal(KIND, spec.op, name, "ours", "PyTorch has one thread (OMP_NUM_THREADS)", plan)]
    contest = contest_of(spec, setting, case, work, [(Contestant(name, "ours", dict), function)], plan)
    call = contest.contestants[0].call

    def on(threads: int) -> Callable[[], Results]:
        def run() -> Results:
            torch.set_num_threads(threads)
            return call()

        return run

    told = {1: f"{name}, 1 thread", most: f"{name}, {most} threads"}
    try:
        one, many = on(1)(), on(most)()
        other = [result for result in one if not torch.equal(one[result], many[result])]
        if other:
            why = f"on 1 thread and on {most} its bits differ: {', '.join(other)}"
            return [refusal(KIND, spec.op, name, "ours", why, plan)]
        del one, many
        both = [Contestant(text, "ours", on(threads), "the same bits") for threads, text in told.items()]
        return hold(dataclasses.replace(contest, kind=KIND, contestants=both, limit=None, limited_by=""), plan)
    finally:
        torch.set_num_threads(most)


def memory(spec: Spec, setting: Setting, case: Case, work: str, name: str, plan: Plan) -> Measurement:
    """What the whole process needs for one call above inputs and results, its kernels' own memory included."""
    plan.say(f"{spec.op}, {work}: memory in a process of its own")
    contestant = Contestant(name, "ours", dict, RESIDENT)
    row = blank(Contest(KIND, spec.op, work, shape(spec, case, setting), ()), plan, contestant)
    try:
        above, results = resident_memory(spec.op, case, plan.dtype, name, backward=work == BOTH)
    except (OSError, RuntimeError) as error:
        return dataclasses.replace(row, refused=first_line(error))
    return dataclasses.replace(row, resident_bytes=above, result_bytes=results)
