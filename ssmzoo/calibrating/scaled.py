"""AWQ's scales of a layer: found, and made part of what comes before the maps, or of the maps themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssmzoo.block import Block
from ssmzoo.calibrating.inputs import Hessians, fed_by_norms
from ssmzoo.linear import Linear
from ssmzoo.mlp.dense import GatedMLP
from ssmzoo.quantized import Scheme
from ssmzoo.quantized.scales import best_scale


class Source(NamedTuple):
    """Maps that are given one input, and the parameters ``(k, …)`` that it is proportional to; none if unknown."""

    names: list[str]
    parameters: list[Tensor]


class Scaled:
    """A layer's weights, multiplied by scales in place.

    Args:
        block: the layer.
        maps: those to be rounded, by name, with their schemes.
        own: modules that belong to this layer alone.
        seen: the second moments of the maps' inputs.
        arguments: of a call of the layer.

    Attributes:
        left: scales by which the inputs of a map have yet to be divided, by its name.
    """

    def __init__(
        self,
        block: Block,
        maps: Mapping[str, tuple[nn.Linear, Scheme]],
        own: set[nn.Module],
        seen: Hessians,
        arguments: tuple[Any, ...],
    ):
        self.left: dict[str, Tensor] = {}
        self._changed: list[tuple[Tensor, Tensor]] = []
        for source in _sources(block, maps, own, seen, arguments):
            chosen = [maps[name] for name in source.names]
            s = best_scale([(map.weight, scheme) for map, scheme in chosen], seen[source.names[0]])
            if bool((s == 1).all()):
                continue
            for map, _ in chosen:
                self._multiply(map.weight, s)
            for parameter in source.parameters:
                self._multiply(parameter, (1 / s).view(-1, *[1] * (parameter.ndim - 1)))
            if not source.parameters:
                self.left.update(dict.fromkeys(source.names, s))

    def undo(self) -> None:
        """Makes all weights what they were: a power of two changes no digit."""
        while self._changed:
            tensor, factor = self._changed.pop()
            tensor.div_(factor)

    def _multiply(self, tensor: Tensor, factor: Tensor) -> None:
        factor = factor.to(tensor)
        tensor.detach().mul_(factor)
        self._changed.append((tensor.detach(), factor))


def _sources(
    block: Block,
    maps: Mapping[str, tuple[nn.Linear, Scheme]],
    own: set[nn.Module],
    seen: Hessians,
    arguments: tuple[Any, ...],
) -> list[Source]:
    """All maps that were called, each once."""
    left = {name: map for name, (map, _) in maps.items() if name in seen}
    found: list[Source] = []
    for norm, names in fed_by_norms(block, left, arguments).items():
        if {norm, *(left[name] for name in names)} <= own:
            found.append(Source(names, list(norm.parameters())))
    mlp = block.mlp
    if isinstance(mlp, GatedMLP) and {mlp.fc1, mlp.fc2} <= own and type(mlp.fc1) is type(mlp.fc2) is Linear:
        after_gate = mlp.fc2.in_features  # fc1's outputs from there on are factors of fc2's inputs
        parameters = [parameter[after_gate:] for parameter in mlp.fc1.parameters()]
        found += [Source([name], parameters) for name, map in left.items() if map is mlp.fc2]
    known = {name for source in found for name in source.names}
    return [*found, *(Source([name], []) for name in left if name not in known)]
