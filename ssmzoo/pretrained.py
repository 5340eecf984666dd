"""Models on disk: our own folders, and published checkpoints of Mamba and Falcon Mamba.

A saved model is a folder with ``config.yaml``, the architecture, and ``model.safetensors``, the weights. A
weight used at several places (a tied embedding, a shared mixer) is stored once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmzoo import files
from ssmzoo.config import ModelConfig
from ssmzoo.files import replacing
from ssmzoo.model import SequenceModel
from ssmzoo.published import published_config

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
SHOWN = 3  # tensors that an error names


def save(model: SequenceModel, folder: str | os.PathLike[str]) -> None:
    """Writes ``config.yaml`` and ``model.safetensors`` into a folder, which is made if need be.

    Each file appears whole or not at all: a crash leaves the one that was there before.

    Raises:
        TypeError: ``model`` is no SequenceModel.
        ValueError: the config ties the head to the embedding, and the model's are two weights.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"save: `model` must be a SequenceModel; got {type(model).__name__}")
    if model.wants_tied and not model.tied:
        raise ValueError(
            "save: with `tie_embeddings` in its config, `model` must have one weight for embedding and head; got two. "
            "Call model.tie_weights() to use the embedding's, or set model.config.tie_embeddings to False"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {names[0]: tensor.detach().contiguous().cpu() for names, tensor in _weights(model)}
    (folder / files.SUMS).unlink(missing_ok=True)  # those of a run's own weights, which are replaced
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
        folder: what :func:`save` or a training run wrote; or a published checkpoint with a ``config.json``: Mamba-1
            as state-spaces store it (``pytorch_model.bin``), Mamba-1 or Falcon Mamba as transformers stores it
            (``model.safetensors``). Weights may be cut into shards, with their index beside them.
        device: where the weights go; PyTorch's default device if None.
        dtype: their dtype; the one they were saved in if None. What the papers keep in float32 stays there.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing.
        ValueError, TypeError: a damaged file (a run's and a checkpoint's are compared with their checksums), a config
            that does not fit, or weights that do not fit the config, by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give one that ssmzoo.pretrained.save or `ssmzoo train` wrote")
    if (folder / CONFIG).is_file():
        folder = files.newest(folder, WEIGHTS)
        config, source = ModelConfig.from_yaml(folder / CONFIG), folder / WEIGHTS
        weights = read_tensors(source)
    elif (folder / "config.json").is_file():
        config = published_config(folder / "config.json")
        source, found = _published_weights(folder)
        weights = convert_mamba_state_dict(found)
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
            ``MambaForCausalLM``, ``MambaModel`` or their Falcon Mamba twins (``backbone.embeddings.weight``,
            ``embeddings.weight``).

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
        raise ValueError(
            f"convert_mamba_state_dict: `state_dict` holds weights that are none of Mamba: {_some(strange)}"
        )
    return converted


@torch.no_grad()
def fill(model: SequenceModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into a model, whose dtypes and devices stay.

    Raises:
        ValueError: naming ``source`` and the first tensors that are missing, unexpected, of another shape or kind of
            number, or hold NaN.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    known: set[str] = set()
    problems: dict[str, list[str]] = {
        "missing": [],
        "unexpected": [],
        "of another shape": [],
        "not one and the same": [],
        "of unfit values": [],
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
        elif (reason := files.unfit(given, tensor)) is not None:
            problems["of unfit values"].append(f"{found[0]} {reason}")
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


def _published_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that says what the weights are, and all of them: one file, or shards with their index."""
    for name in (WEIGHTS, "pytorch_model.bin"):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return whole, read_tensors(whole)
        if index.is_file():
            return index, _shards(index)
    raise FileNotFoundError(f"no weights: {folder} holds neither {WEIGHTS} nor pytorch_model.bin, whole or in shards")


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index (``{"weight_map": {tensor: file}}``) names."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {_line(error)})") from None
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, places.values()))):
        if Path(shard).name != shard:
            raise ValueError(f"{index} must name files beside it; got {shard!r}")
        weights |= read_tensors(index.with_name(shard))
    lacking = sorted(set(places) - set(weights))
    if lacking:
        raise ValueError(f"{index} names tensors that its shards do not hold: {_some(lacking)}")
    return weights


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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
