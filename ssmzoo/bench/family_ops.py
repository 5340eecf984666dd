"""Contests of what a family of transformers runs over a sequence: its own function, and ours in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import CellType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench import BOTH, FORWARD
from ssmkernels.bench.terms import Results
from ssmzoo.integrations.transformers.layers import Function
from ssmzoo.integrations.transformers.lookups import lookups_of
from ssmzoo.integrations.transformers.methods import methods_of

# Of what transformers looks up, the functions over sequences that are not convolutions
OVER_SEQUENCES = ("selective_scan_fn", "mamba_chunk_scan_combined", "chunk_gated_delta_rule", "chunk_kda")
WORKS = {FORWARD: f"its op, {FORWARD}", BOTH: f"its op, {BOTH}"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        maps: linear maps of a layer that the function calls, with what they gave: none of them is computed again.
        last: the one whose result the function returns, which is left out.
    """

    function: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    maps: dict[str, Tensor]
    last: str | None

    def __call__(self, backward: bool = False) -> Results:
        """Calls it again; ``backward``: with gradients of all tensors that have them."""
        leaves: dict[str, Tensor] = {}

        def leaf(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaves[name] = value.detach().requires_grad_(backward)
            return leaves[name]

        args = [leaf(f"argument {i}", value) for i, value in enumerate(self.args)]
        kwargs = {name: leaf(name, value) for name, value in self.kwargs.items()}
        given: dict[str, nn.Module] = {name: _Given(leaf(name, value)) for name, value in self.maps.items()}
        with (
            torch.set_grad_enabled(backward),
            _instead(args, given | ({self.last: nn.Identity()} if self.last else {})),
        ):
            found = self.function(*args, **kwargs)
            y = found[0] if isinstance(found, tuple) else found
            if not backward:
                return {"y": y}
            gradients = torch.autograd.grad(y, list(leaves.values()), y.detach(), allow_unused=True)
        named = zip(leaves, gradients, strict=True)
        return {"y": y.detach(), **{f"the gradient of {name}": g for name, g in named if g is not None}}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A function of a family, and ours, each with the arguments that its own model gives it.

    They are the same numbers, as they lie in memory there.

    Attributes:
        name: as transformers has it.
    """

    name: str
    own: Call
    ours: Call

    def calls(self, work: str) -> tuple[Callable[[], Results], Callable[[], Results]]:
        """Ours and theirs; with ``BOTH``, gradients of all tensors that have them."""
        return functools.partial(self.ours, work == BOTH), functools.partial(self.own, work == BOTH)


def recorded(
    family: str, ours: ModuleType, theirs: ModuleType, fast: nn.Module, slow: nn.Module, ids: Tensor
) -> Iterator[Recorded]:
    """What runs over a sequence in a family's models, as their first layers call it.

    Args:
        ours, theirs: the family's module, which is accelerated, and a copy that no acceleration reaches.
        fast, slow: a model of each, with the same weights.
        ids: the tokens that they read, ``(b l)``.
    """
    now = {lookup.function: lookup for lookup in lookups_of(ours)}
    for lookup in lookups_of(theirs):
        if lookup.function in OVER_SEQUENCES:
            here = now[lookup.function].cells["implementation"]
            own = _first(lookup.own["torch_function"], slow, ids, _cell(lookup.cells["implementation"]))
            our = _first(here.cell_contents, fast, ids, _cell(here))
            if own and our:
                yield Recorded(lookup.function, own, our)
    methods = {there.method.name: there.owner for there in methods_of(family, ours)}
    for there in methods_of(family, theirs):
        name, attribute = there.method.name, there.method.attribute
        if there.method.over_time and there.method.runs.startswith("ssmkernels."):
            owners = (there.owner, slow), (methods[name], fast)
            own, our = (
                _first(getattr(o, attribute), m, ids, functools.partial(setattr, o, attribute)) for o, m in owners
            )
            if own and our:
                yield Recorded(name, own, our)


def _cell(cell: CellType) -> Callable[[Any], None]:
    return functools.partial(setattr, cell, "cell_contents")


def _first(function: Function, model: nn.Module, ids: Tensor, put: Callable[[Function], None]) -> Call | None:
    """The first call of a function in a forward pass; ``put`` puts another one where the model finds it."""
    calls: list[Call] = []

    @functools.wraps(function)
    def watch(*args: Any, **kwargs: Any) -> Any:
        given: dict[str, Tensor] = {}
        maps = {name: part for name, part in _layer(args).items() if isinstance(part, nn.Linear)}
        hooks = [part.register_forward_hook(functools.partial(_keep, given, name)) for name, part in maps.items()]
        try:
            found = function(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        y = found[0] if isinstance(found, tuple) else found
        last = next((name for name, kept in given.items() if kept is y), None)
        calls.append(Call(function, args, kwargs, {name: kept for name, kept in given.items() if name != last}, last))
        return found

    put(watch)
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        put(function)
    return calls[0] if calls else None


def _keep(given: dict[str, Tensor], name: str, part: nn.Module, args: Any, result: Tensor) -> None:
    given[name] = result


class _Given(nn.Module):
    """Stands for a linear map, and gives what it gave."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def _layer(args: Sequence[Any]) -> dict[str, nn.Module | None]:
    """The parts of the layer whose method is called."""
    return args[0]._modules if args and isinstance(args[0], nn.Module) else {}


@contextlib.contextmanager
def _instead(args: Sequence[Any], parts: dict[str, nn.Module]) -> Iterator[None]:
    """Puts other modules for those of these names into the layer whose method is called."""
    layer = _layer(args)
    before = dict(layer)
    layer.update(parts)
    try:
        yield
    finally:
        layer.update(before)
