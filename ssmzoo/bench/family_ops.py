"""Contests of what a family of transformers runs over a sequence: its own function, and ours in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench import BOTH, FORWARD
from ssmkernels.bench.contest import Results
from ssmzoo.integrations.transformers.layers import Function
from ssmzoo.integrations.transformers.lookups import lookups_of
from ssmzoo.integrations.transformers.methods import methods_of

# Of what transformers looks up, the functions over sequences that are not convolutions
OVER_SEQUENCES = ("selective_scan_fn", "mamba_chunk_scan_combined", "chunk_gated_delta_rule", "chunk_kda")
WORKS = {FORWARD: f"its op, {FORWARD}", BOTH: f"its op, {BOTH}"}


class Recorded:
    """A function of a family, its first call in a forward pass, and ours.

    Attributes:
        name: as transformers has it.
        own, ours: both take the arguments of the call.
    """

    def __init__(self, name: str, own: Function, ours: Function, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.name, self.own, self.ours = name, own, ours
        self._args, self._kwargs = args, kwargs

    def calls(self, work: str) -> tuple[Callable[[], Results], Callable[[], Results]]:
        """Ours and theirs, with the same arguments; with ``BOTH``, gradients of all tensors that have them."""
        backward = work == BOTH
        return functools.partial(self._call, self.ours, backward), functools.partial(self._call, self.own, backward)

    def _call(self, function: Function, backward: bool) -> Results:
        leaves: dict[str, Tensor] = {}

        def leaf(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaves[name] = value.detach().requires_grad_(backward)
            return leaves[name]

        args = [leaf(f"argument {i}", value) for i, value in enumerate(self._args)]
        kwargs = {name: leaf(name, value) for name, value in self._kwargs.items()}
        with torch.set_grad_enabled(backward):
            found = function(*args, **kwargs)
            y = found[0] if isinstance(found, tuple) else found
            if not backward:
                return {"y": y}
            gradients = torch.autograd.grad(y.float().square().mean(), list(leaves.values()), allow_unused=True)
        named = zip(leaves, gradients, strict=True)
        return {"y": y.detach(), **{f"the gradient of {name}": g for name, g in named if g is not None}}


def recorded(family: str, ours: ModuleType, theirs: ModuleType, model: nn.Module, ids: Tensor) -> Iterator[Recorded]:
    """What runs over a sequence in a family's model, as its first layer calls it.

    Args:
        ours, theirs: the family's module, which is accelerated, and a copy that no acceleration reaches.
        model: one of the copy.
        ids: the tokens that it reads, ``(b l)``.
    """
    now = {lookup.function: lookup for lookup in lookups_of(ours)}
    for lookup in lookups_of(theirs):
        if lookup.function in OVER_SEQUENCES:
            own = lookup.own["torch_function"]
            watch, found = _watched(own)
            lookup.supply(watch)
            try:
                _read(model, ids)
            finally:
                lookup.restore()
            yield from (Recorded(lookup.function, own, now[lookup.function], *call) for call in found[:1])
    methods = {there.method.name: there for there in methods_of(family, ours)}
    for there in methods_of(family, theirs):
        if there.method.over_time and there.method.runs.startswith("ssmkernels."):
            own = getattr(there.owner, there.method.attribute)
            watch, found = _watched(own)
            setattr(there.owner, there.method.attribute, watch)
            try:
                _read(model, ids)
            finally:
                setattr(there.owner, there.method.attribute, own)
            fast_one = methods[there.method.name]
            replaced = getattr(fast_one.owner, there.method.attribute)
            yield from (Recorded(there.method.name, own, replaced, *call) for call in found[:1])


def _watched(function: Function) -> tuple[Function, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """A function that does the same, and the list of its calls so far."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @functools.wraps(function)
    def watch(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    return watch, calls


def _read(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model(ids, use_cache=False)
