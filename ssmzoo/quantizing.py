"""Models whose weights are kept in 8 or 4 bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.block import Block
from ssmzoo.model import SequenceModel
from ssmzoo.quantized import (
    Rounded,
    Scheme,
    by_hessian,
    maps_to_quantize,
    quantize_maps,
    scheme_for,
    schemes_of,
    to_nearest,
)

SEQUENCES = 8  # that calibration runs at once

Hessians = dict[str, Tensor]  # by the names of maps: the second moments of their inputs


def quantize(
    model: SequenceModel,
    scheme: str | Mapping[str, Any],
    *,
    calibrate: Tensor | None = None,
    group_size: int | None = None,
) -> SequenceModel:
    """Keeps the weights of a model's linear maps and embedding in few bits, in place.

    Each map becomes a :class:`~ssmzoo.quantized.QuantizedLinear`. What the papers keep in float32, convolutions, norms
    and the stacked weights of experts stay as they are.

    Args:
        model: what :func:`ssmzoo.build` gave, or a published model.
        scheme: "int8"; "int4", with embedding and head in 8 bits; or patterns of the maps' names → "int8", "int4" or
            ``{"bits": 4, "group_size": 128}``, of which the first that fits a name counts. Maps that none fits stay.
        calibrate: token ids ``(b, l)`` such as the model will see. The layers' maps in 4 bits are then rounded by GPTQ
            (Frantar et al. 2022, arXiv 2210.17323), one layer after another, each with the inputs that the layers
            before it give once they are quantised. Without it every weight is rounded to the nearest.
        group_size: inputs that share a scale in 4 bits, a multiple of 32; the scheme's own if None, which is 64.

    Returns:
        The same model; its ``config`` has the scheme under ``quantization``.

    Raises:
        TypeError: ``model`` is no SequenceModel, or ``calibrate`` no tensor of ids.
        ValueError: an unknown scheme, a pattern that fits no map, a model that is quantised already or whose weights
            are on the meta device or not finite, or a head that shares its embedding's weights under another scheme;
            or ``calibrate`` gives a map inputs that are not finite. The model then stays as it was.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"quantize: `model` must be a SequenceModel; got {type(model).__name__}")
    if model.config.quantization:
        raise ValueError("quantize: `model` must not be quantised already; load the weights that it was made from")
    schemes = schemes_of(scheme, group_size)
    places = list(maps_to_quantize(model, schemes))
    for pattern in schemes:
        if pattern not in ("embedding", "lm_head") and not list(maps_to_quantize(model, {pattern: schemes[pattern]})):
            raise ValueError(f"quantize: the pattern {pattern!r:.80} in `scheme` fits no map of the model")
    if model.tied and scheme_for("embedding", schemes) != scheme_for("lm_head", schemes):
        raise ValueError("quantize: `scheme` must be the same for embedding and lm_head, which share their weights")
    if any(place.map.weight.is_meta for place in places):
        raise ValueError("quantize: `model` must have weights; they are on the meta device")
    for place in places:
        if not place.map.weight.isfinite().all():
            raise ValueError(f"quantize: `model` must have finite weights; some of {place.name} are not")
    tokens = None if calibrate is None else _checked(model, calibrate)
    try:
        if tokens is None:
            quantize_maps(model, schemes)
        else:
            _calibrated(model, schemes, tokens)
    except BaseException:  # the model is again what it was
        for place in places:
            setattr(place.parent, place.name.rpartition(".")[2], place.map)
        raise
    model.config.quantization = schemes
    return model


def _checked(model: SequenceModel, calibrate: Tensor) -> Tensor:
    if not isinstance(calibrate, Tensor) or calibrate.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"quantize: `calibrate` must be a tensor of token ids, int64 or int32; got {calibrate!r:.80}")
    if model.config.d_input is not None:
        raise ValueError("quantize: `calibrate` must be None, as the model takes features and no tokens")
    if calibrate.ndim != 2 or calibrate.numel() == 0:
        raise ValueError(f"quantize: `calibrate` must have shape (b, l); got {tuple(calibrate.shape)}")
    return calibrate


@torch.no_grad()
def _calibrated(model: SequenceModel, schemes: Mapping[str, Mapping[str, Any]], tokens: Tensor) -> None:
    """Quantises layer after layer, and then the rest."""
    training = model.training
    model.eval()
    try:
        batches = [_before_layers(model, some) for some in tokens.split(SEQUENCES)]
        for i, block in enumerate(model.blocks):
            own = [place for place in maps_to_quantize(model, schemes) if place.name.startswith(f"layers.{i}.")]
            four = {place.name: place.map for place in own if place.scheme.bits == 4}
            seen = _hessians(block, four, batches)
            schemes_of_layer = {place.name: dataclasses.asdict(place.scheme) for place in own}
            quantize_maps(model, schemes_of_layer, functools.partial(_rounded, seen))
            batches = [(block(*arguments)[0], *arguments[1:]) for arguments in batches]
    finally:
        model.train(training)
    quantize_maps(model, schemes)


def _rounded(seen: Hessians, name: str, module: nn.Linear | nn.Embedding, scheme: Scheme) -> Rounded:
    """A map's weights with regard to what it has seen; to the nearest where that is nothing."""
    if name not in seen:
        return to_nearest(module.weight, scheme)
    if not seen[name].isfinite().all():
        raise ValueError(f"quantize: `calibrate` must give {name} inputs whose squares are finite; some are not")
    return by_hessian(module.weight, seen[name], scheme)


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


def _hessians(block: Block, maps: Mapping[str, nn.Module], batches: Sequence[tuple[Any, ...]]) -> Hessians:
    """The second moments of what each map is given, of those that are called."""
    found: Hessians = {}

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
        found[name] = found[name] + x.T @ x if name in found else x.T @ x

    handles = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: note(name, arguments))
        for name, module in maps.items()
    ]
    try:
        for x, state, borders, embedded, values in batches:
            block(x, state, borders, embedded, list(values))
    finally:
        for handle in handles:
            handle.remove()
    return found
