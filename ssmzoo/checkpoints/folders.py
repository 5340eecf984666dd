"""Folders of published models: ``config.json`` and weights, in one file or in shards with their index."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.exporting import Export
from ssmzoo.checkpoints.renaming import Written
from ssmzoo.checkpoints.tensors import write_tensors
from ssmzoo.files import naming, sync, unfinished

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_of(given: int | str, argument: str = "save: `max_shard_size`") -> int:
    """Bytes: a number, or text such as "5GB" or "200MiB".

    Raises:
        ValueError: neither, or less than 1; calls it ``argument``.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMG]?I?B)?\s*", str(given), re.IGNORECASE)
    unit = UNITS.get((match[2] or "").upper()) if match else None
    if match is None or unit is None or isinstance(given, bool) or float(match[1]) * unit < 1:
        raise ValueError(f"{argument} must be bytes, or a text such as '5GB'; got {given!r:.80}")
    return math.floor(float(match[1]) * unit)


def check_new(folder: Path) -> None:
    """Refuses a folder that holds something.

    Raises:
        FileExistsError, NotADirectoryError: it does, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save: `folder` must be a folder; got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"save: `folder` must be new or empty in this format; {folder} holds files")


def write_folder(export: Export, folder: Path, max_shard_size: int) -> None:
    """Writes a model into a folder that is whole or not there at all.

    Args:
        export: the model.
        folder: new or empty.
        max_shard_size: bytes of weights in a file; more of them are cut into shards.

    Raises:
        OSError: something cannot be written; the folder is as it was then.
    """
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(folder):
            temporary.mkdir()
            if export.config is not None:
                (temporary / "config.json").write_text(json.dumps(_plain(export.config), indent=2) + "\n")
            _write_weights(export, temporary, max_shard_size)
            for path in sorted(temporary.iterdir()):
                sync(path)
            os.replace(temporary, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def shards(weights: Sequence[Written], max_shard_size: int) -> list[list[Written]]:
    """Weights in their order, cut where the next would make a shard too large."""
    found: list[list[Written]] = [[]]
    room = max_shard_size
    for written in weights:
        if written.tensor.nbytes > room and found[-1]:
            found.append([])
            room = max_shard_size
        found[-1].append(written)
        room -= written.tensor.nbytes
    return found


def _write_weights(export: Export, folder: Path, max_shard_size: int) -> None:
    parts = shards(export.weights, max_shard_size)
    if len(parts) == 1:
        _write(parts[0], folder / export.file)
        return
    if export.config is None:
        raise ValueError(f"save: `max_shard_size` must hold all weights in this format; {export.file} is one file")
    places: dict[str, str] = {}
    stem, suffix = export.file.rsplit(".", 1)
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05}-of-{len(parts):05}.{suffix}"
        _write(part, folder / name)
        places |= {written.name: name for written in part}
    index = {"metadata": {"total_size": sum(w.tensor.nbytes for w in export.weights)}, "weight_map": places}
    (folder / f"{export.file}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write(part: Sequence[Written], path: Path) -> None:
    """One file. Tensors that are views of a larger one get memory of their own, and lose it again."""
    tensors: Mapping[str, Tensor] = {written.name: _own(written.tensor) for written in part}
    if path.suffix == ".safetensors":
        write_tensors(tensors, path)
    else:
        torch.save(dict(tensors), path)


def _own(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous().cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _plain(value: Any) -> Any:
    """As JSON can hold it; infinity, which it lacks, in transformers' words."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value
