"""Which modules of a model are maps that can be quantised, and putting quantised ones into their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ssmzoo.linear import Linear, WideBiasLinear
from ssmzoo.quantized.modules import QuantizedEmbedding, QuantizedLinear, QuantizedMap
from ssmzoo.quantized.rounding import Rounded, to_nearest
from ssmzoo.quantized.scheme import Scheme, scheme_for
from ssmzoo.wide import KeepsFloat32

LINEAR = (Linear, WideBiasLinear, nn.Linear)

Round = Callable[[str, nn.Linear | nn.Embedding, Scheme], Rounded]


class Place(NamedTuple):
    """A map in a model: its name, its module, the module that holds it, and its scheme."""

    name: str
    map: nn.Linear | nn.Embedding
    parent: nn.Module
    scheme: Scheme


def maps_to_quantize(model: nn.Module, schemes: Mapping[str, Mapping[str, Any]]) -> Iterator[Place]:
    """The linear maps and the embedding of a model that a scheme is for.

    Not among them are those whose weights the papers keep in float32, and modules of somebody else's in the place of a
    map.
    """
    wide = {
        f"{path}.{name}".removeprefix(".").removesuffix(".weight")
        for path, module in model.named_modules()
        if isinstance(module, KeepsFloat32)
        for name in module.float32_parameters
        if name.endswith(".weight")
    }
    for name, module in list(model.named_modules()):
        if type(module) in LINEAR or (type(module) is nn.Embedding and name == "embedding"):
            scheme = None if name in wide else scheme_for(name, schemes)
            if scheme is not None:
                parent = model.get_submodule(name.rpartition(".")[0])
                yield Place(name, module, parent, scheme)


@torch.no_grad()
def quantize_maps(
    model: nn.Module, schemes: Mapping[str, Mapping[str, Any]], rounded: Round | None = None
) -> list[str]:
    """Puts quantised maps into the places of a model's own; a weight at two places stays one.

    Args:
        model: that has the maps.
        schemes: patterns of their names → options of a scheme; the first pattern that fits counts.
        rounded: gives a map's weights in few bits; to the nearest if None. Weights on the meta device stay there.

    Returns:
        The names of the maps.
    """
    made: dict[tuple[int, Scheme], QuantizedMap] = {}
    names = []
    for name, module, parent, scheme in maps_to_quantize(model, schemes):
        kind: Any = QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
        new = kind(module, scheme)
        twin = made.get((id(module.weight), scheme))
        if twin is not None:
            new.take(Rounded(twin.weight_q, twin.scales, twin.zeros))
        elif not module.weight.is_meta:
            new.take(to_nearest(module.weight, scheme) if rounded is None else rounded(name, module, scheme))
        made[id(module.weight), scheme] = new
        setattr(parent, name.rpartition(".")[2], new)
        names.append(name)
    return names
