"""One contest: everybody does the same work, is compared first, and is timed in alternation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels.bench.limits import Limits
from ssmkernels.bench.measure import compete, exponent, peak_memory

Results = Mapping[str, Tensor]
Role = Literal["ours", "peer", "limit"]

# Root mean square of the difference from our results, relative to that of our results: it tells the same work from
# another. How exact an implementation is, its own check tells.
SAME = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}

FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        device, dtype: where and in what.
        limits: of this machine.
        seconds: for each contestant of a contest.
        peers: whether others take part.
        quick: small sizes, and no growth.
        changes: sizes and options by name, over the usual ones.
        say: is told what is going on.
    """

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    seconds: float = 1.0
    peers: bool = True
    quick: bool = False
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Contestant:
    """Somebody who takes part. ``call`` does the work and returns results by name; of a limit nothing is compared."""

    name: str
    role: Role
    call: Callable[[], Results]
    note: str = ""


@dataclass(frozen=True)
class Contest:
    """What is to be done, and by whom.

    Attributes:
        kind: "ops", "mixers" or "models".
        what: the op's, mixer's or model's name.
        work: "forward", "forward + backward", "prefill" or "decoding".
        shape: the sizes, for people.
        contestants: the first of ours has the results that all others must have.
        limit: the least seconds, where no contestant of that role measures it.
        limited_by: what the limit is.
        tokens: of one call; 0 where that has no meaning.
        length: where this is one of several lengths that show growth; 0 elsewhere.
    """

    kind: str
    what: str
    work: str
    shape: str
    contestants: Sequence[Contestant]
    limit: float | None = None
    limited_by: str = ""
    tokens: int = 0
    length: int = 0


@dataclass(frozen=True)
class Measurement:
    """One line of the result. Times are seconds a call; None where nothing was measured, and ``refused`` says why."""

    kind: str
    what: str
    work: str
    implementation: str
    role: Role
    shape: str
    dtype: str
    device: str
    median: float | None = None
    low: float | None = None  # first quartile
    high: float | None = None  # third quartile
    samples: int = 0
    limit: float | None = None
    limited_by: str = ""
    of_limit: float | None = None  # median / limit
    of_ours: float | None = None  # median / median of our fastest
    tokens_per_second: float | None = None
    peak_bytes: int | None = None  # of tensors, above the inputs
    result_bytes: int | None = None  # of them, the results
    length: int = 0  # where it is one of several that show growth
    time_exponent: float | None = None
    memory_exponent: float | None = None
    note: str = ""
    refused: str = ""


def hold(contest: Contest, plan: Plan) -> list[Measurement]:
    """Holds a contest. Who fails, or does other work, is not timed: the line says why."""
    admitted: list[Contestant] = []
    refused: dict[str, str] = {}
    peaks: dict[str, tuple[int | None, int | None]] = {}
    truth: Results | None = None
    for one in sorted(contest.contestants, key=lambda c: c.role != "ours"):
        if one.role == "limit":
            admitted.append(one)
            continue
        plan.say(f"{contest.what}, {contest.work}: comparing {one.name}")
        try:
            results, peak = peak_memory(one.call, plan.device)
        except NotImplementedError as error:
            refused[one.name] = f"cannot do this: {first_line(error)}"
            continue
        except Exception as error:  # whatever other people's code raises
            refused[one.name] = f"raises {type(error).__name__}: {first_line(error)}"
            continue
        difference = "" if truth is None else differs(results, truth, plan.dtype)
        if difference:
            refused[one.name] = f"its results are others: {difference}"
            continue
        truth = results if truth is None else truth
        peaks[one.name] = peak, sum(t.nbytes for t in results.values())
        admitted.append(one)
    del truth
    plan.say(f"{contest.what}, {contest.work}: timing")
    timings = compete({one.name: one.call for one in admitted}, device=plan.device, seconds=plan.seconds)
    ours = min((timings[one.name].median for one in admitted if one.role == "ours"), default=None)
    limit = next((timings[one.name].median for one in admitted if one.role == "limit"), contest.limit)
    rows = []
    for one in contest.contestants:
        row = blank(contest, plan, one)
        if one.name in refused:
            rows.append(dataclasses.replace(row, refused=refused[one.name]))
            continue
        timing = timings[one.name]
        low, high = timing.quartiles
        memory, result = peaks.get(one.name, (None, None))
        rows.append(
            dataclasses.replace(
                row,
                median=timing.median,
                low=low,
                high=high,
                samples=len(timing.samples),
                limit=limit,
                of_limit=timing.median / limit if limit else None,
                of_ours=timing.median / ours if ours else None,
                tokens_per_second=contest.tokens / timing.median if contest.tokens else None,
                peak_bytes=memory,
                result_bytes=result,
            )
        )
    return rows


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
    """Holds the same contest of one contestant at several lengths; at last comes a line with the fitted exponents."""
    measured: list[Measurement] = []
    for contest in contests:
        rows = hold(contest, plan)
        yield rows
        measured += [row for row in rows if row.median and row.peak_bytes]
    if len(measured) > 1:
        lengths = [row.length for row in measured]
        first = measured[0]
        whole = Contest(first.kind, first.what, first.work, f"length {lengths[0]} to {lengths[-1]}", ())
        yield [
            dataclasses.replace(
                blank(whole, plan, Contestant(first.implementation, first.role, dict)),
                time_exponent=exponent(lengths, [row.median or 0.0 for row in measured]),
                memory_exponent=exponent(lengths, [row.peak_bytes or 0 for row in measured]),
            )
        ]


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
