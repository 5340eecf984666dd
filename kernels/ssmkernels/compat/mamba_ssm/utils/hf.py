"""Published models, from a folder or the Hugging Face hub, where the package has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmkernels.compat.mamba_ssm._layers import Device

__all__ = ["load_config_hf", "load_state_dict_hf"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_config_hf(model_name: str) -> dict[str, Any]:
    """What a model's ``config.json`` holds.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is no JSON object.
    """
    path = _file(model_name, "config.json")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(found).__name__}")
    return found


def load_state_dict_hf(model_name: str, device: Device = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A model's weights, from ``model.safetensors`` or ``pytorch_model.bin``; no code in them is run.

    Args:
        device, dtype: what the tensors are converted to.

    Raises:
        FileNotFoundError: there are none.
    """
    path = _file(model_name, *WEIGHTS)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in found.items()}


def _file(model_name: str, *names: str) -> Path:
    """The first file of these names in a folder, or of a model on the hub."""
    folder = Path(model_name)
    if folder.is_dir():
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} holds no {' or '.join(names)}")
        return found[0]
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"no folder {str(model_name)!r:.200}; models on the Hugging Face hub need huggingface_hub"
        ) from None
    for name in names:
        try:
            return Path(hf_hub_download(model_name, name))
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{model_name} on the Hugging Face hub has no {' or '.join(names)}")
