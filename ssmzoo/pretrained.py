"""Models on disk: our own folders, and the published Mamba checkpoints.

A saved model is a folder with ``config.yaml``, the architecture, and ``model.safetensors``, the weights. A
weight used at several places (a tied embedding, a shared mixer) is stored once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
SHOWN = 3  # tensors that an error names


def save(model: SequenceModel, folder: str | os.PathLike[str]) -> None:
    """Writes ``config.yaml`` and ``model.safetensors`` into a folder, which is made if need be.

    Each file appears whole or not at all: a crash leaves the one that was there before.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"save: `model` must be a SequenceModel; got {type(model).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {names[0]: tensor.detach().contiguous().cpu() for names, tensor in _weights(model)}
    with replacing(folder / WEIGHTS) as path:
        save_file(weights, path, {"format": "pt"})
    with replacing(folder / CONFIG) as path:
        path.write_text(model.config.to_yaml())


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SequenceModel:
    """The model that a folder holds.

    Args:
        folder: what :func:`save` or a training run wrote; or a published Mamba-1 checkpoint, as state-spaces
            (``config.json``, ``pytorch_model.bin``) or transformers (``config.json``, ``model.safetensors``)
            store it.
        device: where the weights go; PyTorch's default device if None.
        dtype: their dtype; the one they were saved in if None. What the papers keep in float32 stays there.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing.
        ValueError, TypeError: a damaged file, a config that does not fit, or weights that do not fit the
            config, by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give one that ssmzoo.pretrained.save or `ssmzoo train` wrote")
    if (folder / CONFIG).is_file():
        config, source = ModelConfig.from_yaml(folder / CONFIG), folder / WEIGHTS
        weights = read_tensors(source)
    elif (folder / "config.json").is_file():
        config = _published_config(folder / "config.json")
        source = folder / WEIGHTS
        if not source.is_file():
            source = folder / "pytorch_model.bin"
        weights = convert_mamba_state_dict(read_tensors(source))
    else:
        raise FileNotFoundError(f"{folder} holds no model: there is no {CONFIG} in it, nor a config.json")
    from ssmzoo.zoo import build  # which comes here for folders

    model = build(config, device=device, dtype=_main_dtype(weights) if dtype is None else dtype)
    fill(model, weights, str(source))
    return model


def convert_mamba_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a published Mamba to ours; the tensors are the same.

    Args:
        state_dict: of a state-spaces checkpoint (``backbone.embedding.weight``), or of transformers'
            ``MambaForCausalLM`` or ``MambaModel`` (``backbone.embeddings.weight``, ``embeddings.weight``).

    Raises:
        ValueError: keys of another kind of model, the first of them by name.
    """
    converted: dict[str, Tensor] = {}
    strange = []
    for key, tensor in state_dict.items():
        name = re.sub(r"^embeddings\.", "embedding.", key.removeprefix("backbone."))
        if not re.match(r"(embedding|norm_f|lm_head|layers\.\d+\.(mixer|norm2?|mlp))\.", name):
            strange.append(key)
        converted[name] = tensor
    if strange:
        raise ValueError(f"convert_mamba_state_dict: these are not weights of Mamba: {_some(strange)}")
    return converted


@torch.no_grad()
def fill(model: SequenceModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into a model, whose dtypes and devices stay.

    Raises:
        ValueError: naming ``source`` and the first tensors that are missing, unexpected or of another shape.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    known: set[str] = set()
    problems: dict[str, list[str]] = {
        "missing": [],
        "unexpected": [],
        "of another shape": [],
        "not one and the same": [],
    }
    for names, tensor in _weights(model):
        known.update(names)
        found = [name for name in names if name in weights]
        if not found:
            problems["missing"].append(names[0])
            continue
        given = weights[found[0]]
        if given.shape != tensor.shape:
            problems["of another shape"].append(f"{found[0]} {tuple(given.shape)} for {tuple(tensor.shape)}")
        elif not all(torch.equal(given, weights[name]) for name in found[1:]):
            problems["not one and the same"].append(" and ".join(found))
        copies.append((tensor, given))
    problems["unexpected"] += [name for name in weights if name not in known]
    said = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if said:
        raise ValueError(f"the weights in {source} do not fit the config. Tensors " + "; ".join(said))
    for tensor, given in copies:
        tensor.copy_(given)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or (weights alone, never code) a PyTorch file, by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no such file at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights: {path} is missing")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({_line(error)}): copy it again, or use another") from None
    except Exception as error:  # torch.load raises whatever its parsers do
        raise ValueError(f"{path} is damaged, or holds more than weights ({_line(error)})") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors; got {type(found).__name__}")
    return found


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place on disk once the block has succeeded."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Has the system write a file, or a folder's list of files, to disk now."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _weights(model: SequenceModel) -> list[tuple[list[str], Tensor]]:
    """Each tensor of the model with all its names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [(names[key], tensors[key]) for key in names]


def _main_dtype(weights: Mapping[str, Tensor]) -> torch.dtype | None:
    """That of the largest floating-point tensor: some small ones are float32 whatever the others are."""
    floating = [tensor for tensor in weights.values() if tensor.is_floating_point()]
    return max(floating, key=Tensor.numel).dtype if floating else None


def _published_config(path: Path) -> ModelConfig:
    """Our config from a published ``config.json``.

    Raises:
        ValueError: it is damaged, or describes something other than Mamba-1.
    """
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {_line(error)}") from None
    try:
        values = _from_transformers(given) if "model_type" in given else _from_state_spaces(given)
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None
    if values is None:
        raise ValueError(f"{path} describes no Mamba-1: other published architectures cannot be loaded")
    return ModelConfig.from_dict({"pattern": ["mamba"], **values}, str(path))


def _from_state_spaces(given: Mapping[str, Any]) -> dict[str, Any] | None:
    mixer = dict(given.get("ssm_cfg") or {})
    if mixer.pop("layer", "Mamba1") != "Mamba1" or given.get("attn_layer_idx") or given.get("d_intermediate"):
        return None
    mixer.pop("use_fast_path", None)  # which of their kernels runs
    return {
        "d_model": given["d_model"],
        "n_layers": given["n_layer"],
        "mixers": {"mamba": mixer},
        "vocab_size": given["vocab_size"],
        "pad_vocab_size_multiple": given.get("pad_vocab_size_multiple", 8),
        "norm": "rms" if given.get("rms_norm", True) else "layer",
        "residual_in_fp32": given.get("residual_in_fp32", True),
        "tie_embeddings": given.get("tie_embeddings", True),
    }


def _from_transformers(given: Mapping[str, Any]) -> dict[str, Any] | None:
    if given["model_type"] != "mamba" or given.get("hidden_act", "silu") != "silu":
        return None
    mixer = {
        "d_state": given.get("state_size", 16),
        "d_conv": given.get("conv_kernel", 4),
        "expand": given.get("expand", 2),
        "dt_rank": given.get("time_step_rank", "auto"),
        "conv_bias": given.get("use_conv_bias", True),
        "bias": given.get("use_bias", False),
    }
    return {
        "d_model": given["hidden_size"],
        "n_layers": given["num_hidden_layers"],
        "mixers": {"mamba": mixer},
        "vocab_size": given["vocab_size"],
        "norm_eps": given.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": given.get("residual_in_fp32", True),
        "tie_embeddings": given.get("tie_word_embeddings", True),
    }


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
