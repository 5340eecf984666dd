"""Contests of one op: our implementations and other people's, at the sizes that its spec calls real use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.bench.contest import first_line, grow, hold, refusal
from ssmkernels.bench.peers import Peer, Setting, peers_of, setting_of
from ssmkernels.bench.terms import BOTH, FORWARD, Contest, Contestant, Measurement, Plan, Results
from ssmkernels.check.spec import Case, Draw, Spec, spec_of, tensors_of
from ssmkernels.core.dispatch import explain
from ssmkernels.testing import check

LENGTHS = ("l", "m", "l_k", "length")  # sizes of a case that are a length
SHORT = 8  # tokens up to which a length is that of a step, which does not grow
QUICK = 256  # tokens at most
GROWTH = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the length
CHECKED = 33  # a length for the check, beside that of the spec's base

Admitted = list[tuple[Contestant, Callable[..., Any]]]


def bench_op(op: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times an op's implementations and its peers: forward, forward and backward, and how ours grows with the length.

    Gives the lines of one contest after the other.

    Raises:
        ValueError: no such op.
    """
    spec, setting = spec_of(op), setting_of(op)
    case = real_use(spec, setting, plan)
    timed = False
    for further in ({}, *(() if plan.changes else setting.further)):
        for rows in _one_case(spec, setting, real_use(spec, setting, plan, further), plan):
            timed = timed or any(row.role == "ours" and row.median is not None for row in rows)
            yield rows
    lengths = lengths_of(case)
    if timed and lengths and not plan.quick:
        work = BOTH if spec.differentiable and setting.backward else FORWARD
        plan.say(f"{op}: growth with the length")
        only: Admitted = [(Contestant("ssmzoo", "ours", dict), spec.function())]
        longer = ({**case, **{name: round(case[name] * factor) for name in lengths}} for factor in GROWTH)
        yield from grow((contest_of(spec, setting, one, work, only, plan, one[lengths[0]]) for one in longer), plan)


def _one_case(spec: Spec, setting: Setting, case: Case, plan: Plan) -> Iterator[list[Measurement]]:
    """Everyone who can do this call and passes its check; the reference only where there is nobody else."""
    op = spec.op
    arguments = make(spec, setting, case, plan.dtype, plan.device)
    rows = checked_rows(spec, setting, case)
    admitted: Admitted = []
    for name in explain(spec.function(), **arguments).able:
        if name == "reference" and admitted:
            continue
        why = fails(op, name, rows, plan)
        if why:
            yield [refusal("ops", op, name, "ours", why, plan)]
        else:
            admitted.append((Contestant(name, "ours", dict), functools.partial(spec.function(), implementation=name)))
    if not admitted:
        return
    for peer in peers_of(op, plan.device.type) if plan.peers else ():
        why = peer.package.missing or fails(op, peer, rows, plan)
        if why:
            yield [refusal("ops", op, peer.name, "peer", why, plan)]
        else:
            admitted.append((Contestant(peer.name, "peer", dict, peer.note), peer.function))
    for work in (FORWARD, BOTH) if spec.differentiable and setting.backward else (FORWARD,):
        yield hold(contest_of(spec, setting, case, work, admitted, plan), plan)


def real_use(spec: Spec, setting: Setting, plan: Plan, further: Case | None = None) -> Case:
    """The case that is timed: the spec's, with what the peers' common setting, ``further`` and the plan change."""
    case = dict(spec.case({**spec.bench, **setting.case, **(further or {})}))
    changes = {name: value for name, value in plan.changes.items() if name in case}
    case.update({name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()})
    if plan.quick:
        short = {name: min(case[name], QUICK) for name in lengths_of(case) if name not in plan.changes}
        case.update(short)
    return case


def make(spec: Spec, setting: Setting, case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of the timed call."""
    return {**spec.inputs(case, dtype, device, seed=0), **setting.arguments}


def gradients_for(results: Results) -> dict[str, Tensor]:
    """What comes into the backward pass of the timed call."""
    return {name: _gradient_for(value) for name, value in results.items()}


def work_of(
    spec: Spec, function: Callable[..., Any], arguments: Mapping[str, Any], incoming: Mapping[str, Tensor] | None = None
) -> Callable[[], Results]:
    """A function without arguments that does the work once and returns results, and gradients, by name.

    Args:
        incoming: the gradient of each result; only the forward pass, without autograd, if None.
    """
    arguments = {
        name: value.clone() if name in spec.mutates else value for name, value in arguments.items()
    }  # those that are written are everyone's own
    if incoming is None:

        def forward() -> Results:
            with torch.no_grad():
                return _named(spec, function(**arguments), arguments)

        return forward
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items() if _differentiable(value)}

    def both() -> Results:
        results = _named(spec, function(**{**arguments, **leaves}), arguments)
        pairs = [(value, incoming[name]) for name, value in results.items() if value.requires_grad]
        values, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, list(leaves.values()), given, allow_unused=True)
        gradients = zip(leaves, found, strict=True)
        named = {name: value.detach() for name, value in results.items()}
        return named | {f"the gradient of {name}": g for name, g in gradients if g is not None}

    return both


def least(spec: Spec, case: Case, arguments: Mapping[str, Any], results: Results, work: str) -> tuple[float, float]:
    """FLOPs and bytes that cannot be avoided.

    Forward: every argument read, every result written. With backward: arguments read again, gradients of results read,
    and gradients of arguments written; three times the FLOPs.
    """
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    read, written = sum(t.nbytes for t in given), sum(t.nbytes for t in results.values())
    if work == FORWARD:
        return spec.flops(case), read + written
    differentiable = sum(t.nbytes for t in given if _differentiable(t))
    return 3 * spec.flops(case), 2 * read + differentiable + 2 * written


def contest_of(
    spec: Spec,
    setting: Setting,
    case: Case,
    work: str,
    admitted: Admitted,
    plan: Plan,
    length: int = 0,
) -> Contest:
    """What is timed of an op in one case; each of ``admitted`` with the function that does it."""
    arguments = make(spec, setting, case, plan.dtype, plan.device)
    results = work_of(spec, admitted[0][1], arguments)()
    incoming = None if work == FORWARD else gradients_for(results)
    flops, nbytes = least(spec, case, arguments, results, work)
    return Contest(
        kind="ops",
        what=spec.op,
        work=work,
        shape=shape(spec, case, setting),
        contestants=[
            Contestant(one.name, one.role, work_of(spec, function, arguments, incoming), one.note)
            for one, function in admitted
        ],
        limit=plan.limits.seconds(flops, nbytes),
        limited_by=plan.limits.which(flops, nbytes),
        length=length,
    )


def shape(spec: Spec, case: Case, setting: Setting) -> str:
    """The sizes that the bench case names, and what it leaves away."""
    sizes = [f"{name} {case[name]}" for name in dict.fromkeys((*spec.bench, *spec.row(case))) if name != "layout"]
    told = [size for size in sizes if not size.endswith((" True", " False", " None"))]
    return ", ".join(told) + (f"; {setting.note}" if setting.note else "")


def checked_rows(spec: Spec, setting: Setting, case: Case) -> list[Case]:
    """A small grid for the check: the switches of the timed case, with the base's sizes and with another length."""
    base = spec.case({})
    sizes = {name for name, value in base.items() if _is_size(value) or _is_size(case[name])}
    switches = {name: value for name, value in spec.row(case).items() if name not in sizes} | dict(setting.case)
    lengths = [name for name in lengths_of(case) if isinstance(base[name], int)]
    return [switches, {**switches, **dict.fromkeys(lengths, CHECKED)}] if lengths else [switches]


def _is_size(value: object) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, int) and not isinstance(part, bool) for part in parts)


def fails(op: str, contestant: str | Peer, rows: list[Case], plan: Plan) -> str:
    """Why a contestant's check fails, in one line; empty where it passes."""
    name = contestant if isinstance(contestant, str) else contestant.name
    plan.say(f"{op}: checking {name}")
    function = contestant if isinstance(contestant, str) else contestant.function
    gradients = True if isinstance(contestant, str) else contestant.gradients
    try:
        report = check(
            op, function, cases=rows, dtypes=[plan.dtype], device=plan.device, gradients=gradients, raises=False
        )
    except Exception as error:  # whatever other people's code raises
        return f"raises {type(error).__name__}: {first_line(error)}"
    if report.failures:
        return f"fails its check: {report.failures[0].failure.strip().splitlines()[0]}"
    if not report.checks:
        return f"cannot do this: {report.skipped[0][2]}"
    return ""


def lengths_of(case: Case) -> list[str]:
    """Which sizes of a case are a length."""
    return [name for name in LENGTHS if isinstance(case.get(name), int) and case[name] > SHORT]


def _differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _named(spec: Spec, returned: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    results = dict(zip(spec.results, tensors_of(returned), strict=False))
    return results | {name: arguments[name] for name in spec.mutates}


def _gradient_for(value: Tensor) -> Tensor:
    draw = Draw(1)
    made = draw.complex_normal(*value.shape) if value.is_complex() else draw.normal(*value.shape)
    return made.to(value.device, value.dtype)
