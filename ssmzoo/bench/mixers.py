"""Contests of one mixer: its whole layer, beside its limit and beside other people's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench import BOTH, FORWARD, Contest, Contestant, Measurement, Plan, grow, hold, refusal
from ssmkernels.bench.contest import first_line
from ssmkernels.bench.peers import ABSENT
from ssmkernels.bench.terms import Results
from ssmzoo.bench.peers import MIXERS, Twin, rivals
from ssmzoo.bench.products import limit_of
from ssmzoo.bench.yardsticks import another_kind, dense_attention
from ssmzoo.mixer import Mixer
from ssmzoo.registry import build_mixer, list_mixers
from ssmzoo.testing import check_mixer

SIZES = {"d_model": 768, "length": 512, "batch": 1}
QUICK = {"d_model": 256, "length": 64, "batch": 1}
GROWTH = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the length


def candidates() -> list[str]:
    """The mixers that can be built without being told more than their width."""
    return [
        name
        for name, info in list_mixers().items()
        if not any(default is Parameter.empty for default in info.options.values())
    ]


def bench_mixer(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times a mixer and its peers: forward, forward and backward, and how ours grows with the length.

    ``plan.changes`` may hold d_model, length and batch, and options of the mixer as ``mamba.d_state``.
    """
    mixer, sizes, told, why = prepared(name, plan)
    if mixer is None:
        yield [refusal("mixers", name, "ssmzoo", "ours", why, plan)]
        return
    twins, absent = rivals("mixers", name, mixer, MIXERS.get(name, ()), plan)
    yield from ([row] for row in absent)
    for work in (FORWARD, BOTH):
        yield hold(contest_of(name, mixer, twins, sizes, told, work, plan), plan)
    if not plan.quick:
        plan.say(f"{name}: growth with the length")
        longer = ({**sizes, "length": max(1, round(sizes["length"] * factor))} for factor in GROWTH)
        contests = (contest_of(name, mixer, None, one, told, BOTH, plan) for one in longer)
        yield from grow(contests, plan)


def prepared(name: str, plan: Plan) -> tuple[Mixer | None, dict[str, Any], str, str]:
    """The mixer with the plan's options, its sizes, those options for people; None and why not where it cannot be."""
    missing = list_mixers()[name].missing
    if missing:
        return None, {}, "", f"{ABSENT}: pip install {' '.join(missing)}"
    sizes = {key: plan.changes.get(key, value) for key, value in (QUICK if plan.quick else SIZES).items()}
    options = {k.partition(".")[2]: v for k, v in plan.changes.items() if k.partition(".")[0] == name and "." in k}
    torch.manual_seed(0)
    with torch.device(plan.device):
        mixer = build_mixer(name, sizes["d_model"], **options).to(plan.dtype).eval()
    plan.say(f"{name}: checking")
    try:
        check_mixer(mixer)
    except AssertionError as error:
        return None, {}, "", f"fails its check: {first_line(error)}"
    return mixer, sizes, "".join(f", {key} {value}" for key, value in options.items()), ""


def contest_of(
    name: str,
    mixer: Mixer,
    twins: list[tuple[str, str, Twin]] | None,
    sizes: dict[str, Any],
    told: str,
    work: str,
    plan: Plan,
) -> Contest:
    """What is timed of a mixer; ``twins`` None: ours alone, as one of several lengths."""
    own = Twin(mixer, dict(mixer.named_parameters()))
    shape = sizes["batch"], sizes["length"], sizes["d_model"]
    x, gradient = (torch.randn(*shape, device=plan.device, dtype=plan.dtype) for _ in range(2))
    contestants = [Contestant("ssmzoo", "ours", _work(own, x, gradient, work))]
    limit = None
    if twins is not None:
        contestants += [Contestant(n, "peer", _work(twin, x, gradient, work), note) for n, note, twin in twins]
        limit = limit_of(mixer, shape[0], shape[1], work == BOTH)
        contestants += [limit] if limit is not None else []
        contestants += [
            Contestant(other, "yardstick", _work(twin, x, gradient, work), "another kind of layer, of the same size")
            for other, twin in another_kind(name, mixer, plan)
        ]
        contestants += dense_attention(name, mixer, shape[0], shape[1], work, plan)
    return Contest(
        kind="mixers",
        what=name,
        work=work,
        shape=", ".join(f"{key} {value}" for key, value in sizes.items()) + told,
        contestants=contestants,
        limited_by=limit.name if limit is not None else "",
        tokens=shape[0] * shape[1],
        length=shape[1] if twins is None else 0,
    )


def _work(twin: Twin, x: Tensor, gradient: Tensor, work: str) -> Callable[[], Results]:
    if work == FORWARD:

        def forward() -> Results:
            with torch.no_grad():
                return {"y": twin.call(x)}

        return forward
    leaf = x.detach().requires_grad_()
    inputs: list[Tensor | nn.Parameter] = [leaf, *twin.weights.values()]
    names = ["the gradient of x", *(f"the gradient of {name}" for name in twin.weights)]

    def both() -> Results:
        y = twin.call(leaf)
        return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, inputs, gradient), strict=True))}

    return both
