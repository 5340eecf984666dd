"""Checkpoints that many processes wrote together by ``torch.distributed.checkpoint``, read as whole tensors.

A tensor's key is its kind and name, ``weights/layers.0.norm.weight`` or ``optimizer/layers.0.norm.weight/exp_avg``. Of
a weight that tensor parallelism divides, each piece is a tensor of its own, whose key ends in ``@0``, ``@1``, ….
``sharded.yaml`` says how they make a whole.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ssmzoo.checkpoints import checksums
from ssmzoo.checkpoints.divided import Layout
from ssmzoo.checkpoints.tensors import write_tensors

METADATA, LAYOUTS = ".metadata", "sharded.yaml"
WEIGHTS_KIND, OPTIMIZER_KIND = "weights", "optimizer"


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint's tensors are in this form."""
    return (folder / LAYOUTS).is_file()


def key_of(kind: str, name: str, piece: int | None = None, quantity: str | None = None) -> str:
    """The key of a tensor."""
    key = f"{kind}/{name}" if quantity is None else f"{kind}/{name}/{quantity}"
    return key if piece is None else f"{key}@{piece}"


def layouts_text(layouts: Mapping[str, Layout], ranks: int) -> str:
    """The content of ``sharded.yaml``."""
    found = {name: [layout.dim, [list(section) for section in layout.sections]] for name, layout in layouts.items()}
    return yaml.safe_dump({"tensor": ranks, "divided": found}, default_flow_style=None)


def read_layouts(folder: Path) -> tuple[dict[str, Layout], int]:
    """How weights are divided, and over how many processes.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content = yaml.safe_load((folder / LAYOUTS).read_text())
        divided = content["divided"].items()
        layouts = {
            str(name): Layout(int(dim), tuple((int(size), bool(cut)) for size, cut in sections))
            for name, (dim, sections) in divided
        }
        return layouts, int(content["tensor"])
    except (yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / LAYOUTS} is damaged: {' '.join(str(error).split())}") from None


def stored_keys(folder: Path) -> dict[str, Any]:
    """PyTorch's metadata of each tensor, by its key."""
    from torch.distributed.checkpoint import FileSystemReader

    return dict(FileSystemReader(folder).read_metadata().state_dict_metadata)


def read_whole(folder: Path, kind: str, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Whole tensors on the CPU, by what follows their kind: names, or names and quantities.

    Args:
        folder: of a checkpoint.
        kind: ``weights`` or ``optimizer``.
        wanted: the names of the weights that they belong to; all if None.

    Raises:
        ValueError: a file is damaged.
    """
    import torch.distributed.checkpoint as dcp

    layouts, ranks = read_layouts(folder)
    names = None if wanted is None else set(wanted)
    found: dict[str, Tensor] = {}
    for key, meta in stored_keys(folder).items():
        if not key.startswith(f"{kind}/"):
            continue
        rest = key.removeprefix(f"{kind}/").partition("@")[0]
        if names is None or (rest if kind == WEIGHTS_KIND else rest.rpartition("/")[0]) in names:
            found[key] = torch.empty(meta.size, dtype=meta.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is asked for
        dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    whole: dict[str, Tensor] = {}
    for key in list(found):
        if key not in found:  # a piece that was taken with its first
            continue
        name, at, _ = key.partition("@")
        rest = name.removeprefix(f"{kind}/")
        if not at:
            whole[rest] = found.pop(key)
            continue
        weight = rest if kind == WEIGHTS_KIND else rest.rpartition("/")[0]
        whole[rest] = layouts[weight].whole([found.pop(f"{name}@{i}") for i in range(ranks)])
    return whole


def consolidate(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Makes one ``model.safetensors``, with its ``config.yaml``, of a checkpoint that many processes wrote.

    Args:
        folder: of a run, whose newest checkpoint is meant, or of a checkpoint.
        out: where both files go, which is made if need be. :func:`ssmzoo.build` reads it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged.
    """
    source, target = Path(folder), Path(out)
    if not is_sharded(source):
        steps = checksums.checkpoints(source)
        if not steps or not is_sharded(steps[-1]):
            raise FileNotFoundError(f"{source} holds no checkpoint of several processes")
        source = steps[-1]
    checksums.check(source)
    target.mkdir(parents=True, exist_ok=True)
    weights, config = read_whole(source, WEIGHTS_KIND), (source / "config.yaml").read_text()
    writers = {"config.yaml": partial(_write_text, config), "model.safetensors": partial(write_tensors, weights)}
    checksums.install(target, writers)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)
