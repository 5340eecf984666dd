"""Published checkpoints: ``config.json``, the names of weights, and shards.

transformers' models have a file each in :mod:`ssmzoo.checkpoints.families`, those of state-spaces are in
:mod:`ssmzoo.checkpoints.state_spaces`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmzoo.checkpoints.families import family, list_families
from ssmzoo.checkpoints.renaming import renamed
from ssmzoo.checkpoints.state_spaces import config_from_state_spaces, convert_mamba_state_dict
from ssmzoo.checkpoints.tensors import line, read_tensors
from ssmzoo.checkpoints.weights import some
from ssmzoo.config import ModelConfig
from ssmzoo.config.entries import reachable

FILES = ("model.safetensors", "pytorch_model.bin")


def published_config(path: Path) -> ModelConfig:
    """Our config from that of a published checkpoint, of state-spaces or of transformers.

    Raises:
        ValueError: it is damaged, or describes a model that is none of ours.
    """
    return config_from(_read(path), str(path))


def config_from(given: Mapping[str, Any], source: str) -> ModelConfig:
    """Our config from what a published ``config.json`` holds; ``source`` is what errors call it.

    Raises:
        ValueError: as :func:`published_config`.
    """
    kind = given.get("model_type")
    try:
        values = config_from_state_spaces(given) if kind is None else None
        if kind in list_families():
            values = used(family(kind).config(given))
    except KeyError as error:
        raise ValueError(f"{source}: the key {error} is missing") from None
    except (TypeError, ArithmeticError, AttributeError, IndexError) as error:
        raise ValueError(f"{source} holds values of the wrong kind ({type(error).__name__}: {line(error)})") from None
    if values is None:
        raise ValueError(
            f"{source} describes none of state-spaces' Mamba, Mamba-2 and Mamba-3 and {', '.join(list_families())}: "
            "other published architectures cannot be loaded"
        )
    return ModelConfig.from_dict(values, source)


def used(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values without the mixers that its layers do not reach."""
    pattern, mixers = values["pattern"][: values["n_layers"]], values.get("mixers", {})
    used = reachable(pattern, mixers)
    return {**values, "pattern": pattern, "mixers": {k: v for k, v in mixers.items() if k in used}}


def published_type(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The ``model_type`` that a ``config.json`` gives, if it has one, and all that it holds."""
    given = _read(path)
    return given.get("model_type"), given


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(), object_hook=_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(given).__name__}")
    return given


def _number(value: dict[str, Any]) -> Any:
    """transformers writes infinity, which JSON lacks, as ``{"__float__": "Infinity"}``."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def convert_state_dict(
    state_dict: Mapping[str, Tensor], model_type: str | None = None, config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Weights of a published model by our names; tensors that are one in ours are put together.

    Args:
        state_dict: as the checkpoint's files hold it, or as that of transformers' model.
        model_type: transformers' name of the architecture, such as "recurrent_gemma"; None for what state-spaces
            published.
        config: what the checkpoint's ``config.json`` holds. Needed where sizes say how a weight is laid out: by
            Qwen3-Next and the families after it.

    Raises:
        ValueError: an unknown ``model_type``, a config that is missing, or keys of another kind of model, the first of
            them by name.
    """
    return take_converted(dict(state_dict), model_type, config)


def take_converted(
    weights: dict[str, Tensor], model_type: str | None, config: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """As :func:`convert_state_dict`; takes the tensors out of ``weights``, as joined ones need memory of their own."""
    if model_type is None:
        return convert_mamba_state_dict(weights)
    found = family(model_type)
    if hasattr(found, "rules_for"):
        if config is None:
            raise ValueError(
                f"convert_state_dict: `config` must be what config.json of {model_type} holds; got None, which "
                "does not say how its weights are laid out"
            )
        return renamed(weights, found.rules_for(config), found.NAME)
    rules = found.rules(weights) if hasattr(found, "rules") else found.RULES
    return renamed(weights, rules, found.NAME)


def published_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that says what the weights are, and all of them: one file, or shards with their index.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are damaged.
    """
    for name in FILES:
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return whole, read_tensors(whole)
        if index.is_file():
            return index, _shards(index)
    raise FileNotFoundError(f"no weights: {folder} holds neither {' nor '.join(FILES)}, whole or in shards")


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index (``{"weight_map": {tensor: file}}``) names."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {line(error)})") from None
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, places.values()))):
        if Path(shard).name != shard:
            raise ValueError(f"{index} must name files beside it; got {shard!r}")
        weights |= read_tensors(index.with_name(shard))
    lacking = sorted(set(places) - set(weights))
    if lacking:
        raise ValueError(f"{index} names tensors that its shards do not hold: {some(lacking)}")
    return weights
