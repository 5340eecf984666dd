"""Models with other mixers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.block import Block, entry_mixer
from ssmzoo.config import ModelConfig
from ssmzoo.lower_bounds import share_lower_bounds
from ssmzoo.mixer import Mixer
from ssmzoo.model import SequenceModel


def swap_mixers(model: SequenceModel, swaps: Mapping[str, str | Mapping[str, Any]]) -> SequenceModel:
    """Puts other mixers into a model, in place; all other weights stay.

    Args:
        model: what :func:`build` gave.
        swaps: layer, ``"layers.3"`` or with wildcards ``"layers.*"``, → a mixer's name, or options. Options without a
            ``kind`` change those of the mixer that is there. A layer's exact name counts before wildcards, and those in
            their order. New mixers start fresh, on the device and in the dtype of those they replace.

    Returns:
        The same model; its ``config`` describes what it is now.

    Raises:
        ValueError, TypeError: no layer matches, or the mixer or an option is unknown. The model is then unchanged.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(
            f"swap_mixers: `model` must be a SequenceModel, as ssmzoo.build gives; got {type(model).__name__}"
        )
    names = [f"layers.{i}" for i in range(len(model.layers))]
    for pattern in swaps:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"swap_mixers: {pattern!r} in `swaps` matches no layer; there are layers.0 to {names[-1]}")
    config = model.config.override({})
    config.pattern = [config.entry_of_layer(i) for i in range(config.n_layers)]
    swapped = []
    for i, name in enumerate(names):
        matching = [name] if name in swaps else [p for p in swaps if fnmatch.fnmatchcase(name, p)]
        if matching:
            feed, placement = config.feed_of_layer(i), config.norm_placement_of_layer(i)
            config.pattern[i] = _entry(config, config.pattern[i], swaps[matching[0]])
            if config.feed_of_layer(i) != feed:
                raise ValueError(f"swap_mixers: {name} must keep `feed`: {feed!r}; name it in the options of its mixer")
            if config.norm_placement_of_layer(i) != placement:
                raise ValueError(
                    f"swap_mixers: {name} must keep `norm_placement`: {placement!r}; name it in the options"
                )
            swapped.append(i)
    used = config.entries_used()
    config.mixers = {name: options for name, options in config.mixers.items() if name in used}
    config = ModelConfig.from_dict(config.to_dict())
    made: dict[int, Mixer] = {}
    for i in swapped:
        entry = config.pattern[i]
        twin = [j for j in (*set(range(len(names))).difference(swapped), *made) if config.pattern[j] == entry]
        if config.mixers.get(entry, {}).get("shared") and twin:
            made[i] = made[twin[0]] if twin[0] in made else model.blocks[twin[0]].mixer
        else:
            made[i] = _fresh(config, entry, i, like=model.blocks[i])
    for i, mixer in made.items():
        model.layers[i].mixer = mixer
    share_lower_bounds([block.mixer for block in model.blocks])
    model.config = config
    return model


def _entry(config: ModelConfig, present: str, wanted: str | Mapping[str, Any]) -> str:
    """The name of the entry for what is wanted in place of ``present``; adds it to the config if there is none yet."""
    entries = {name: {"kind": name, **config.mixers.get(name, {})} for name in {*config.pattern, *config.mixers}}
    if isinstance(wanted, str):
        if wanted in config.mixers:
            return wanted
        options: dict[str, Any] = {"kind": wanted}
    else:
        options = {"kind": entries[present]["kind"], **wanted}
        if options["kind"] == entries[present]["kind"]:
            options = {**{k: v for k, v in entries[present].items() if k != "shared"}, **options}
    for name, known in entries.items():
        if known == options:
            return name
    kind = options["kind"]
    free = (name for name in (kind, *(f"{kind}-{i}" for i in range(2, len(entries) + 3))) if name not in entries)
    name = next(free)
    config.mixers[name] = options
    return name


def _fresh(config: ModelConfig, entry: str, layer: int, like: Block) -> Mixer:
    """The config's mixer of that entry, on the device and in the dtype of a block's weights."""
    weight: Tensor = like.norms[0].weight  # type: ignore[assignment]
    with torch.device(weight.device):
        return entry_mixer(config, entry, layer).to(weight.dtype)
