"""One contest: everybody does the same work, is compared first, and is timed in alternation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ssmkernels.bench.measure import ENDLESS, Timing, compete, exponent, peak_memory, stopwatch
from ssmkernels.bench.terms import Contest, Contestant, Measurement, Plan, Results, Role

UNCOMPARED = ("limit", "yardstick")  # they do other work

# Root mean square of the difference from our results, relative to that of our results: it tells the same work from
# another. How exact an implementation is, its own check tells.
SAME = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def hold(contest: Contest, plan: Plan) -> list[Measurement]:
    """Holds a contest: times, then memory."""
    return weigh(contest, clock(contest, plan), plan)


def clock(contest: Contest, plan: Plan) -> list[Measurement]:
    """Compares and times. Who fails, or does other work, is not timed: the line says why."""
    admitted: list[Contestant] = []
    refused: dict[str, str] = {}
    truth: Results | None = None
    watch, taken = stopwatch(plan.device), dict[str, float]()
    for one in sorted(contest.contestants, key=lambda c: c.role != "ours"):
        if one.role in UNCOMPARED:
            admitted.append(one)
            continue
        plan.say(f"{contest.what}, {contest.work}: comparing {one.name}")
        found: list[Results] = []
        try:
            taken[one.name] = watch(functools.partial(_keep, found, one.call), 1)
        except NotImplementedError as error:
            refused[one.name] = f"cannot do this: {first_line(error)}"
            continue
        except Exception as error:  # whatever other people's code raises
            refused[one.name] = f"raises {type(error).__name__}: {first_line(error)}"
            continue
        results = found.pop()
        difference = "" if truth is None else differs(results, truth, plan.dtype)
        if difference:
            refused[one.name] = f"its results are others: {difference}"
            continue
        truth = results if truth is None else truth
        admitted.append(one)
        del results
    del truth
    plan.say(f"{contest.what}, {contest.work}: timing")
    calls = {one.name: one.call for one in admitted}
    timings = compete(calls, device=plan.device, seconds=plan.seconds, shortest=plan.shortest, before=taken)
    ours = min((timings[one.name].median for one in admitted if one.role == "ours"), default=None)
    limit = next((timings[one.name].median for one in admitted if one.role == "limit"), contest.limit)
    rows = []
    for one in contest.contestants:
        if one.name in refused:
            rows.append(dataclasses.replace(blank(contest, plan, one), refused=refused[one.name]))
            continue
        rows.append(
            dataclasses.replace(
                _timed(contest, plan, one, timings[one.name]),
                limit=limit,
                of_limit=timings[one.name].median / limit if limit else None,
                of_ours=timings[one.name].median / ours if ours else None,
            )
        )
    return rows


def _keep(found: list[Results], call: Callable[[], Results]) -> None:
    found.append(call())


def weigh(contest: Contest, rows: list[Measurement], plan: Plan) -> list[Measurement]:
    """The lines with the memory of those who were timed, and whose calls are not so long that one had to do.

    That comes last: what watches memory leaves an allocator that keeps the largest blocks at hand, and whoever asks
    for such blocks would be faster in the contests after it than in a process of its own.
    """
    plan.say(f"{contest.what}, {contest.work}: measuring memory")
    return [
        row if row.refused or one.role in UNCOMPARED or _endless(row) else _weighed(row, _memory(one, plan))
        for one, row in zip(contest.contestants, rows, strict=True)
    ]


def _endless(row: Measurement) -> bool:
    return (row.median or 0.0) >= ENDLESS


def _memory(one: Contestant, plan: Plan) -> tuple[int, int]:
    """The peak, and the results' part of it."""
    results, peak = peak_memory(one.call, plan.device)
    return peak, sum(t.nbytes for t in results.values())


def _weighed(row: Measurement, memory: tuple[int, int]) -> Measurement:
    return dataclasses.replace(row, peak_bytes=memory[0], result_bytes=memory[1])


def _timed(contest: Contest, plan: Plan, one: Contestant, timing: Timing) -> Measurement:
    """The line of somebody who was timed."""
    low, high = timing.quartiles
    return dataclasses.replace(
        blank(contest, plan, one),
        median=timing.median,
        low=low,
        high=high,
        samples=len(timing.samples),
        tokens_per_second=contest.tokens / timing.median if contest.tokens else None,
    )


def blank(contest: Contest, plan: Plan, one: Contestant) -> Measurement:
    """A line with nothing measured yet."""
    return Measurement(
        kind=contest.kind,
        what=contest.what,
        work=contest.work,
        implementation=one.name,
        role=one.role,
        shape=contest.shape,
        dtype=str(plan.dtype).removeprefix("torch."),
        device=str(plan.device),
        limited_by=contest.limited_by,
        length=contest.length,
        note=one.note,
    )


def refusal(kind: str, what: str, implementation: str, role: Role, why: str, plan: Plan) -> Measurement:
    """The line of somebody who does not take part at all."""
    nobody = Contestant(implementation, role, dict)
    return dataclasses.replace(blank(Contest(kind, what, "", "", ()), plan, nobody), refused=why)


def grow(contests: Iterable[Contest], plan: Plan) -> Iterator[list[Measurement]]:
    """Times one contestant at several lengths, which take turns; at last comes a line with what fits all of them."""
    admitted: list[Contest] = []
    for contest in contests:
        one = contest.contestants[0]
        plan.say(f"{contest.what}, {contest.work}: length {contest.length}")
        try:
            one.call()
        except Exception as error:  # too little memory, or whatever a kernel raises
            told = f"raises {type(error).__name__}: {first_line(error)}"
            yield [dataclasses.replace(blank(contest, plan, one), refused=told)]
            continue
        admitted.append(contest)
    calls = {str(contest.length): contest.contestants[0].call for contest in admitted}
    timings = compete(calls, device=plan.device, seconds=plan.seconds)
    measured = []
    for contest in admitted:
        one, timing = contest.contestants[0], timings[str(contest.length)]
        row = _weighed(_timed(contest, plan, one, timing), _memory(one, plan))
        of_limit = timing.median / contest.limit if contest.limit else None
        measured.append(dataclasses.replace(row, limit=contest.limit, of_limit=of_limit))
        yield [measured[-1]]
    if len(measured) > 1:
        yield [_fit(measured, plan)]


def _fit(measured: Sequence[Measurement], plan: Plan) -> Measurement:
    """How time and memory grow over lengths, which rise."""
    first, last = measured[0], measured[-1]
    lengths, times = [row.length for row in measured], [row.median or 0.0 for row in measured]
    peaks = [row.peak_bytes or 0 for row in measured]
    whole = Contest(first.kind, first.what, first.work, f"length {first.length} to {last.length}", ())
    return dataclasses.replace(
        blank(whole, plan, Contestant(first.implementation, first.role, dict)),
        time_exponent=exponent(lengths, times),
        memory_exponent=exponent(lengths, peaks) if all(peaks) else None,
        per_token=(times[-1] / lengths[-1]) / (times[0] / lengths[0]),
    )


def differs(results: Results, truth: Results, dtype: torch.dtype) -> str:
    """How results differ from ours by more than rounding; empty where they do not."""
    for name, expected in truth.items():
        actual = results.get(name)
        if actual is None:
            return f"there is no {name}"
        if actual.shape != expected.shape:
            return f"{name} has shape {tuple(actual.shape)} where ours has {tuple(expected.shape)}"
        wide = torch.complex128 if expected.is_complex() else torch.float64
        expected = expected.to(wide)
        size = expected.abs().square().mean().sqrt()
        off = (actual.to(wide) - expected).abs().square().mean().sqrt()
        if expected.numel() and not bool(off <= SAME[dtype] * size + 1e-30):
            return f"{name} is off by {float(off / size):.2g} of its size"
    return ""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
