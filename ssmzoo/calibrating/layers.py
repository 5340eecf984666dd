"""Layer after layer: what it is given, how its maps are rounded, and what it then gives to the next."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.calibrating.inputs import Hessians, second_moments
from ssmzoo.calibrating.scaled import Scaled
from ssmzoo.model import SequenceModel
from ssmzoo.quantized import Rounded, Scheme, by_hessian, maps_to_quantize, quantize_maps, to_nearest
from ssmzoo.quantized.replacing import Place

SEQUENCES = 8  # that are run at once
METHODS = ("gptq", "awq")

Schemes = Mapping[str, Mapping[str, Any]]


def calibrated(model: SequenceModel, schemes: Schemes, tokens: Tensor, method: str) -> dict[str, Any]:
    """Quantises the layers, and then the rest; where an error comes, all weights are again what they were.

    Args:
        model: which has none of the schemes yet.
        schemes: patterns of maps' names → options.
        tokens: ids ``(b, l)``.
        method: of :data:`METHODS`, for the layers' maps in 4 bits.

    Returns:
        The schemes that the maps then have.
    """
    found = {pattern: dict(options) for pattern, options in schemes.items()}
    with contextlib.ExitStack() as undo, torch.no_grad(), _evaluating(model):
        batches = [_before_layers(model, some) for some in tokens.split(SEQUENCES)]
        for i, block in enumerate(model.blocks):
            places = [place for place in maps_to_quantize(model, schemes) if place.name.startswith(f"layers.{i}.")]
            four = {place.name: place for place in places if place.scheme.bits == 4}
            seen = second_moments(block, {name: place.map for name, place in four.items()}, batches)
            own = {place.name: place.scheme for place in places}
            if method == "gptq":
                quantize_maps(model, _options(own), partial(_rounded, seen))
            else:
                layer = Scaled(block, _weights(model, four), _of_one_block(model), seen, batches[0])
                undo.callback(layer.undo)
                scales = {name: dataclasses.replace(own[name], input_scale=True) for name in layer.left}
                quantize_maps(model, _options(own | scales))
                for name, s in layer.left.items():
                    model.get_submodule(name).scale_inputs(1 / s)  # type: ignore[operator]
                found = _options(scales) | {name: own for name, own in found.items() if name not in scales}
            batches = [(block(*arguments)[0], *arguments[1:]) for arguments in batches]
        quantize_maps(model, schemes)
        undo.pop_all()
    return found


def _options(schemes: Mapping[str, Scheme]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(scheme) for name, scheme in schemes.items()}


def _rounded(seen: Hessians, name: str, module: nn.Linear | nn.Embedding, scheme: Scheme) -> Rounded:
    """A map's weights with regard to what it has seen; to the nearest where that is nothing."""
    return by_hessian(module.weight, seen[name], scheme) if name in seen else to_nearest(module.weight, scheme)


def _weights(model: SequenceModel, four: Mapping[str, Place]) -> dict[str, tuple[nn.Linear, Scheme]]:
    """The linear maps and their schemes, without those that share a weight with another map."""
    uses = Counter(id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding))
    return {
        name: (place.map, place.scheme)
        for name, place in four.items()
        if isinstance(place.map, nn.Linear) and uses[id(place.map.weight)] == 1
    }


def _of_one_block(model: SequenceModel) -> set[nn.Module]:
    """Modules that no two layers share."""
    uses = Counter(module for block in model.blocks for module in block.modules())
    return {module for module, count in uses.items() if count == 1}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _ReachedError(Exception):
    """The first layer has been called."""


def _before_layers(model: SequenceModel, tokens: Tensor) -> tuple[Any, ...]:
    """The first layer's arguments for token ids."""
    found: list[tuple[Any, ...]] = []

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments)
        raise _ReachedError

    handle = model.layers[0].register_forward_pre_hook(stop)
    try:
        model(tokens)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found[0]
