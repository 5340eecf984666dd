"""What the maps of a layer are given: its second moments, and which norm gives it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.block import Block
from ssmzoo.norm import GatedRMSNorm, LayerNorm, RMSNorm

Hessians = dict[str, Tensor]  # by the names of maps: the second moments of their inputs

TOKENS = 32  # on which it is found out who reads what
NORMS = (RMSNorm, LayerNorm, GatedRMSNorm)  # whose output is multiplied by their weight


def run(block: Block, arguments: tuple[Any, ...]) -> Tensor:
    """The residual stream after a layer; the arguments stay as they are."""
    x, state, borders, embedded, values = arguments
    return block(x, state, borders, embedded, list(values))[0]


def second_moments(block: Block, maps: Mapping[str, nn.Module], batches: Sequence[tuple[Any, ...]]) -> Hessians:
    """X Xᵀ of what each map is given, of those that are called.

    Raises:
        ValueError: some are not finite.
    """
    found: Hessians = {}

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
        found[name] = found[name] + x.T @ x if name in found else x.T @ x

    with _before(maps, note):
        for arguments in batches:
            run(block, arguments)
    for name, moments in found.items():
        if not moments.isfinite().all():
            raise ValueError(f"quantize: `calibrate` must give {name} inputs whose squares are finite; some are not")
    return found


def fed_by_norms(block: Block, maps: Mapping[str, nn.Module], arguments: tuple[Any, ...]) -> dict[nn.Module, list[str]]:
    """The norms of a layer whose output nobody but these maps reads, and the names of those.

    Whether somebody else does is found out on a few tokens: the output is replaced by NaN for all but the maps, and the
    layer's must stay what it was, for a whole sequence, and where it has a state for a first part and the token after.
    """
    x, _, borders, embedded, values = arguments
    few: list[Any] = [None if t is None else t[:1, :TOKENS] for t in (x, embedded, *values)]
    short = few[0], None, borders, few[1], few[2:]
    found: dict[nn.Module, list[str]] = {}
    for norm in (module for module in block.modules() if type(module) in NORMS):
        expected, names = _with_output(block, norm, maps, short, lambda y: y.clone())
        if names:
            outputs, _ = _with_output(block, norm, maps, short, lambda y: torch.full_like(y, torch.nan))
            if all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True)):
                found[norm] = names
    return found


def _with_output(
    block: Block,
    norm: nn.Module,
    maps: Mapping[str, nn.Module],
    arguments: tuple[Any, ...],
    replaced: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], list[str]]:
    """A layer's outputs where all but the maps see another output of a norm, and the maps that are given the norm's."""
    given: dict[int, tuple[Tensor, Tensor]] = {}  # what stands for an output, by its id, and the output itself
    names: dict[str, None] = {}

    def hide(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        hidden = replaced(y)
        given[id(hidden)] = hidden, y
        return hidden

    def show(name: str, own: tuple[Any, ...]) -> Any:
        if id(own[0]) not in given:
            return None
        names[name] = None
        return given[id(own[0])][1], *own[1:]

    handle = norm.register_forward_hook(hide)
    try:
        with _before(maps, show):
            return _outputs(block, arguments), list(names)
    finally:
        handle.remove()


def _outputs(block: Block, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Of the whole sequence, and where there is a state of all but its last token, and of that."""
    x, _, borders, embedded, values = arguments
    found = [run(block, arguments)]
    if block.mixer.causal and block.mixer.has_state and x.shape[1] > 1:
        state = block.initial_state(len(x), x.shape[1])
        for part in (slice(0, -1), slice(-1, None)):
            own = None if embedded is None else embedded[:, part]
            y, state = block(x[:, part], state, borders, own, [value[:, part] for value in values])
            found.append(y)
    return found


@contextlib.contextmanager
def _before(maps: Mapping[str, nn.Module], note: Callable[[str, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Calls ``note(name, arguments)`` before each call of a map; what it returns takes the arguments' place."""
    handles = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: note(name, arguments))
        for name, module in maps.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
