"""What an op takes on this machine at a model's own sizes, and at the ends of a part where sequences are cut."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.check.spec import spec_of
from ssmkernels.core.names import OPS
from ssmzoo.parallel.adjoints import ADJOINTS
from ssmzoo.parallel.transitions import TRANSITIONS
from ssmzoo.planning.counting import op_flops
from ssmzoo.planning.stopwatch import seconds

TOKENS = 2048  # of what is timed, at most
COLD = 2**26  # bytes of tensors that are used in turn, as those of a step are: no cache holds them all
MOST_LAYERS = 8


def op_seconds(op: str, given: Mapping[str, Any], dtype: torch.dtype) -> tuple[float, float, float, float]:
    """Seconds of an op's forward and backward pass at these sizes, and of what a part leaves and asks where sequences
    are cut, 0 where that is not found by itself; and the FLOPs of the first."""
    spec = spec_of(op)
    short = {"l": min(given["l"], TOKENS)} if "l" in given else {}
    short |= {"length": min(given["length"], TOKENS)} if "length" in given else {}
    plain = {
        key: False if isinstance(spec.base[key], bool) else None for key in ("packed", "state") if key in spec.base
    }
    case = spec.case({**spec.bench, **given, **short, **plain})
    call, declared = spec.function(), OPS[op].declared
    # As layers do, each call has inputs of its own, and what is kept of all waits for the backward passes
    first = spec.inputs(case, dtype, "cpu", 0)
    size = sum(x.nbytes for x in first.values() if isinstance(x, Tensor))
    several = max(2, min(MOST_LAYERS, COLD // max(size, 1)))
    layers = [first, *(spec.inputs(case, dtype, "cpu", seed) for seed in range(1, several))]
    leaves = [[x.requires_grad_() for x in inputs.values() if _differentiable(x)] for inputs in layers]

    def forwards() -> list[Tensor]:
        every = [call(**inputs) for inputs in layers]
        return [found if isinstance(found, Tensor) else found[0] for found in every]

    gradient = torch.ones_like(forwards()[0])

    def both() -> None:
        for y, of in reversed(list(zip(forwards(), leaves, strict=True))):
            torch.autograd.grad(y, of, gradient, allow_unused=True)

    whole, forward = seconds(both) / several, seconds(forwards) / several
    flops = op_flops(op, _taken(declared, first))[0]
    both_ends = _ends(op, {name: x.detach() if isinstance(x, Tensor) else x for name, x in first.items()}, gradient)
    return forward, max(whole - forward, 1e-9), both_ends, flops


def _ends(op: str, inputs: Mapping[str, Any], gradient: Tensor) -> float:
    """Seconds of both ends of a part: what it leaves and what it asks (:mod:`ssmzoo.parallel.adjoints`), or the first
    alone with its gradient (:mod:`ssmzoo.parallel.left`)."""
    if len(gradient) > 1 or op not in TRANSITIONS:
        return 0.0
    function = spec_of(op).function()
    bound = inspect.signature(function).bind(**inputs)
    bound.apply_defaults()
    borders = torch.tensor([0, gradient.shape[1]], dtype=torch.int32)
    call = {**bound.arguments, "cu_seqlens": borders, "return_final_state": True}
    if op in ADJOINTS and ADJOINTS[op].can(call):
        adjoint = ADJOINTS[op]

        @torch.no_grad()
        def both() -> None:
            adjoint.found(function, call, True)
            adjoint.asked(call, gradient)

        return seconds(both)
    if not TRANSITIONS[op].summed:
        return 0.0
    shapes, _, wide = TRANSITIONS[op].like(call)
    call = {key: x.requires_grad_() if _differentiable(x) else x for key, x in call.items()}
    if "initial_angle" in call:
        call["initial_angle"] = torch.zeros(shapes[1], dtype=wide)

    def left() -> None:
        E, M = TRANSITIONS[op].found(function, call)
        sum(x.sum() for x in (*E, *M)).backward()  # type: ignore[union-attr]

    return seconds(left)


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _taken(declared: Any, inputs: Mapping[str, Any]) -> list[Any]:
    """What implementations take of the public arguments; a causal attention's reach is -1 to 0."""
    if declared.name == "attention":
        inputs = {**inputs, "left": -1, "right": 0 if inputs["causal"] else -1}
    return [inputs.get(name) for name in declared.takes]
