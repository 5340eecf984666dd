"""Models by name, from a config, or from disk."""

from __future__ import annotations

import os
from typing import Any

import torch

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
