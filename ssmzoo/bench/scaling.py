"""How ops and mixers scale with the length; ops with threads too, and what memory they take at a long length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ssmkernels.bench import BOTH, Measurement, Plan, grow, refusal, scale_op
from ssmkernels.bench.ops import lengths_of
from ssmkernels.bench.scaling import KIND, QUICK_LONG, lengths_to
from ssmkernels.check.spec import specs
from ssmzoo.bench.mixers import candidates, contest_of, prepared
from ssmzoo.registry import list_mixers

DEFAULT = ("selective_scan", "mamba")
LONG = 65_536


def scalable() -> list[str]:
    """Ops that have a length, and mixers."""
    ops = [op for op, spec in specs().items() if lengths_of(spec.case(spec.bench))]
    return list(dict.fromkeys([*ops, *candidates()]))


def bench_scaling(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Scales the op, the mixer, or where both have this name, both.

    ``plan.changes`` may hold sizes of the op's case, or the mixer's options, d_model, length and batch. A length in it
    is the longest.
    """
    if name in specs():
        yield from scale_op(name, plan)
    if name in list_mixers():
        yield from scale_mixer(name, plan)


def scale_mixer(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times a layer forward and backward at lengths from 1024 to 65 536."""
    mixer, sizes, told, why = prepared(name, plan)
    if mixer is None:
        yield [refusal(KIND, name, "ssmzoo", "ours", why, plan)]
        return
    longest = plan.changes.get("length", QUICK_LONG if plan.quick else LONG)
    lengths = ({**sizes, "length": length} for length in lengths_to(longest))
    contests = (contest_of(name, mixer, None, one, told, BOTH, plan) for one in lengths)
    yield from grow((dataclasses.replace(contest, kind=KIND) for contest in contests), plan)
