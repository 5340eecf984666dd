"""Models by name, from a config, or from disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ssmzoo.checkpoints.hub import fetch, hub_id
from ssmzoo.config import ModelConfig, load_config, model_folder
from ssmzoo.devices import usable
from ssmzoo.footprint import check_memory
from ssmzoo.model import SequenceModel
from ssmzoo.pretrained import load


def build(
    name_or_path_or_config: str | os.PathLike[str] | ModelConfig | dict[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    **overrides: Any,
) -> SequenceModel:
    """A model by name, from a YAML file, from a config, from a folder that one was saved in, or from the hub.

    Args:
        name_or_path_or_config: one of :func:`list_models`; a path of a YAML file; a :class:`ModelConfig` or its dict;
            or the path of a saved model's folder, which brings its weights (and takes no overrides), of a published
            one, or of a GGUF file: see :func:`ssmzoo.pretrained.load`. A model's name wins over a folder of that name:
            ``"./lstm-tiny"`` is the folder. Where there is no such path, ``"state-spaces/mamba-130m-hf"`` is the name
            of a model on the
            Hugging Face hub, which ``huggingface_hub`` fetches into its cache; ``HF_HUB_OFFLINE=1`` keeps to that.
            Weights and configs are read; code of the hub is never run.
        device: where the weights are made; ``"meta"`` makes none.
        dtype: their dtype; float32 if None. Weights that the papers keep in float32 stay there.
        revision: of a model on the hub: a branch, tag or commit. The commit is in ``model.config.source``.
        overrides: config keys, nested or dotted: ``d_model=1024``, ``mixers={"mamba": {"d_state": 32}}``,
            ``**{"mixers.mamba.d_state": 32}``.

    Raises:
        ValueError, TypeError: an unknown model, key, mixer or option (with what exists and the nearest), a bad value,
            or weights that the device has no memory for.
        FileNotFoundError: a path where nothing is, or no such model on the hub.
        PermissionError, ConnectionError: a model on the hub that is gated, or out of reach.
    """
    given = name_or_path_or_config
    if revision is not None and not isinstance(revision, str):
        raise TypeError(f"build: `revision` must be str or None; got {type(revision).__name__}")
    folder, name = model_folder(given), hub_id(given)
    if folder is not None or name is not None:
        if overrides:
            fresh = "" if folder is None else f". For fresh weights give the path of {folder / 'config.yaml'}"
            raise ValueError(
                f"build: `{next(iter(overrides))}` cannot change, as a saved model's architecture is fixed with its "
                f"weights{fresh}"
            )
        return _loaded(folder, name, revision, device, dtype)
    if revision is not None:
        raise ValueError(f"build: `revision` goes with a model on the hub, such as 'owner/name'; got {given!r:.80}")
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


def _loaded(
    folder: Path | None,
    name: str | None,
    revision: str | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> SequenceModel:
    """What a folder holds, or else a model of the hub."""
    if folder is not None:
        if revision is not None:
            raise ValueError(f"build: `revision` goes with a model on the hub; {folder} is a folder")
        return load(folder, device=device, dtype=dtype)
    folder, source = fetch(name or "", revision)
    model = load(folder, device=device, dtype=dtype)
    model.config.source = source
    return model
