"""Every check there is, on this machine: kernels against their references, mixers against their properties.

What ``ssmzoo verify`` runs. The checks themselves are :func:`ssmkernels.testing.check` and :mod:`ssmzoo.testing`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter
from typing import Any

import torch

from ssmkernels import OPS
from ssmkernels.check.report import Check
from ssmkernels.check.spec import Case, Spec, specs
from ssmkernels.core.names import unknown
from ssmkernels.testing import check
from ssmzoo.devices import usable

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}

# A quick run takes every third case, in these.
QUICK_DTYPES = ("float32", "bfloat16")
QUICK_STEP = 3

D_MODEL = 64

# What those mixers need to be built that cannot be without.
NEEDED: dict[str, dict[str, Any]] = {
    "parallel": {"branches": {"mamba": {"d_state": 4}, "attention": {"head_dim": 16}}},
}


@dataclasses.dataclass
class Summary:
    """What became of one implementation of an op, or of one mixer.

    ``unavailable`` says why it was not checked at all; ``skipped`` counts the cases passed over, by reason.
    """

    subject: str
    implementation: str
    unavailable: str = ""
    checks: list[Check] = dataclasses.field(default_factory=list)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def failures(self) -> list[Check]:
        return [c for c in self.checks if c.failure]

    @property
    def worst(self) -> Check | None:
        """The check that passed with the largest part of its budget used."""
        return max((c for c in self.checks if not c.failure and c.used > 0), key=lambda c: c.used, default=None)

    @property
    def advice(self) -> str:
        """What to do about a failure."""
        if not self.implementation:
            return "please report it"
        if self.implementation == "reference":
            return "the others are held against it: please report it"
        return f"until it is mended: SSMZOO_DISABLE={self.implementation}:{self.subject}"


@dataclasses.dataclass(frozen=True)
class Job:
    """One unit of work: it adds to its summary."""

    summary: Summary
    run: Callable[[], None]


def kernel_jobs(
    ops: Sequence[str] = (),
    implementations: Sequence[str] = (),
    device: str = "cpu",
    dtypes: Sequence[str] = (),
    quick: bool = False,
) -> tuple[list[Summary], list[Job]]:
    """The checks of kernels: all of them, or those that are named.

    Returns:
        A summary for each implementation of each op, still empty, and the work that fills them.

    Raises:
        ValueError: an op, implementation, dtype or device that there is not.
    """
    found = specs()
    for op in ops:
        if op not in found:
            raise ValueError(unknown("op", op, found))
    chosen = {op: spec for op, spec in found.items() if op in (ops or found)}
    every = {name for op in chosen for name in OPS[op].names}
    for name in implementations:
        if name not in every:
            raise ValueError(unknown("implementation" + (f" of {', '.join(ops)}" if ops else ""), name, every))
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(unknown("dtype", name, DTYPES))
    place = usable(device, "--device")
    names = dtypes or (QUICK_DTYPES if quick else tuple(DTYPES))

    summaries, jobs = [], []
    for op, spec in chosen.items():
        here = [Summary(op, name, lacking(op, name)) for name in OPS[op].names if name in (implementations or every)]
        summaries += here
        cases = spec.cases()[:: QUICK_STEP if quick else 1]
        for case in cases:
            for dtype in (DTYPES[name] for name in names):
                jobs += [Job(s, job(s, spec, case, dtype, place)) for s in here if not s.unavailable]
    return summaries, jobs


def job(summary: Summary, spec: Spec, case: Case, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """The work of one case in one dtype."""

    def run() -> None:
        row = spec.row(case)
        try:
            report = check(spec.op, summary.implementation, cases=[row], dtypes=[dtype], device=device, raises=False)
        except Exception as error:  # whatever is broken is reported with the rest
            failure = f"the check cannot run: {type(error).__name__}: {error}"
            summary.checks.append(Check(str(row), str(dtype).removeprefix("torch."), "runs", math.inf, failure))
            return
        summary.checks += report.checks
        summary.skipped.update(reason for _, _, reason in report.skipped)

    return run


def mixer_jobs() -> tuple[list[Summary], list[Job]]:
    """The checks of every property of every mixer, in float64 on the CPU."""
    from ssmzoo.registry import list_mixers
    from ssmzoo.testing import PROPERTIES

    summaries, jobs = [], []
    for name, info in list_mixers().items():
        options = NEEDED.get(name, {})
        required = [o for o, default in info.options.items() if default is Parameter.empty and o not in options]
        why = f"pip install {' '.join(info.missing)}" if info.missing else ""
        why = why or (f"it has no default for {', '.join(required)}" if required else "")
        summary = Summary(name, "", why)
        summaries.append(summary)
        if not why:
            jobs += [Job(summary, mixer_job(summary, name, options, property_)) for property_ in PROPERTIES]
    return summaries, jobs


def mixer_job(summary: Summary, name: str, options: dict[str, Any], property_: str) -> Callable[[], None]:
    """The work of one property of one mixer."""

    def run() -> None:
        from ssmzoo.registry import build_mixer
        from ssmzoo.testing import check_property

        failure = ""
        try:
            torch.manual_seed(0)
            check_property(property_, build_mixer(name, D_MODEL, **options))
        except AssertionError as error:
            failure = str(error)
        except Exception as error:
            failure = f"it raises {type(error).__name__}: {error}"
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        line = f"ssmzoo.testing.check_property({property_!r}, ssmzoo.build_mixer({name!r}, {D_MODEL}{given}))"
        summary.checks.append(Check(property_, "float64", property_, 0.0, failure, line if failure else ""))

    return run


def lacking(op: str, implementation: str) -> str:
    """Why an implementation cannot run on this machine, be it that it is broken; empty where it can."""
    try:
        return OPS[op].why_not(implementation)
    except Exception as error:  # an optional part may be broken in any way
        if "SSMZOO_DISABLE" in str(error):
            raise
        return f"broken: {type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without warnings, of which PyTorch has some about its deterministic mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
