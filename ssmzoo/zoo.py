"""Models by name, and models with other mixers."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.block import Block, entry_mixer
from ssmzoo.config import ModelConfig, load_config, model_folder
from ssmzoo.devices import usable
from ssmzoo.footprint import check_memory
from ssmzoo.mixers._base import Mixer
from ssmzoo.model import SequenceModel


def build(
    name_or_path_or_config: str | os.PathLike[str] | ModelConfig | dict[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> SequenceModel:
    """A model by name, from a YAML file, from a config, or from a folder that one was saved in.

    Args:
        name_or_path_or_config: one of :func:`list_models`; a path of a YAML file; a :class:`ModelConfig` or its dict;
            or the path of a saved model's folder, which brings its weights (and takes no overrides). A model's name
            wins over a folder of that name: ``"./lstm-tiny"`` is the folder.
        device: where the weights are made; ``"meta"`` makes none.
        dtype: their dtype; float32 if None. Weights that the papers keep in float32 stay there.
        overrides: config keys, nested or dotted: ``d_model=1024``, ``mixers={"mamba": {"d_state": 32}}``,
            ``**{"mixers.mamba.d_state": 32}``.

    Raises:
        ValueError, TypeError: an unknown model, key, mixer or option (with what exists and the nearest), a bad value,
            or weights that the device has no memory for.
        FileNotFoundError: a path where nothing is.
    """
    given = name_or_path_or_config
    folder = model_folder(given)
    if folder is not None:
        from ssmzoo.pretrained import load

        if overrides:
            raise ValueError(
                f"build: `{next(iter(overrides))}` cannot change, as a saved model's architecture is fixed with its "
                f"weights. For fresh weights give the path of {folder / 'config.yaml'}"
            )
        return load(folder, device=device, dtype=dtype)
    if isinstance(given, ModelConfig):
        config = given
    elif isinstance(given, dict):
        config = ModelConfig.from_dict(given)
    elif isinstance(given, str | os.PathLike):
        config = load_config(given)
    else:
        raise TypeError(
            f"build: `name_or_path_or_config` must be a model's name, a path, a ModelConfig or a dict; "
            f"got {type(given).__name__}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"build: `dtype` must be a floating-point torch.dtype such as torch.bfloat16; got {dtype!r}")
    config = config.override(overrides)
    where = torch.get_default_device() if device is None else usable(device, "build: `device`")
    check_memory(config, where)
    with where:
        model = SequenceModel(config)
    return model if dtype is None else model.to(dtype)


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
            config.pattern[i] = _entry(config, config.pattern[i], swaps[matching[0]])
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
            made[i] = _fresh(config, entry, like=model.blocks[i])
    for i, mixer in made.items():
        model.layers[i].mixer = mixer
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


def _fresh(config: ModelConfig, entry: str, like: Block) -> Mixer:
    """The config's mixer of that entry, on the device and in the dtype of a block's weights."""
    weight: Tensor = like.norm.weight  # type: ignore[assignment]
    with torch.device(weight.device):
        return entry_mixer(config, entry).to(weight.dtype)
