"""Checkpoints of a run: a folder each, which appears whole or not at all.

``checkpoints/step-0000250/`` holds the model as :mod:`ssmzoo.pretrained` writes it, the optimiser's state as
safetensors and the rest as YAML. Random numbers need no state: all of a step's follow from the seed and the
step's number.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from ssmzoo import pretrained
from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel
from ssmzoo.pretrained import CONFIG, WEIGHTS, read_tensors, replacing, sync

FOLDER, OPTIMIZER, STATE = "checkpoints", "optimizer.safetensors", "state.yaml"


class Checkpoint(NamedTuple):
    """What :func:`read` found: tensors by name, and the state of fp16's loss scaler, or None."""

    folder: Path
    step: int
    config: ModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scaler: dict[str, Any] | None


def write(
    run: Path,
    step: int,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    scaler: dict[str, Any] | None,
    keep: int,
) -> None:
    """Adds a checkpoint to a run, renews the run's model files, and removes all but the newest ``keep``."""
    folder = run / FOLDER / f"step-{step:07d}"
    if not folder.exists():  # otherwise the run was stopped again before its first step
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        pretrained.save(model, temporary)
        save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
        (temporary / STATE).write_text(yaml.safe_dump({"step": step, "scaler": scaler}))
        for path in (temporary / OPTIMIZER, temporary / STATE, temporary):
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
    for name in (CONFIG, WEIGHTS):
        with replacing(run / name) as path:
            _link(folder / name, path)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def read(run: Path) -> Checkpoint:
    """A run's newest checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; says what to do.
    """
    folders = checkpoints(run)
    if not folders:
        raise FileNotFoundError(f"{run} has no checkpoint to go on from: start the run again, with another --out")
    folder = folders[-1]
    try:
        state = yaml.safe_load((folder / STATE).read_text())
        return Checkpoint(
            folder,
            int(state["step"]),
            ModelConfig.from_yaml(folder / CONFIG),
            read_tensors(folder / WEIGHTS),
            read_tensors(folder / OPTIMIZER),
            state["scaler"],
        )
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        before = f"go on from the one before it, {folders[-2].name}" if len(folders) > 1 else "start the run again"
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint {folder} is damaged: delete it to {before}. ({reason})") from None


def restore(checkpoint: Checkpoint, model: SequenceModel, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's weights and optimiser state back; settings such as the learning rate stay.

    Raises:
        ValueError: it belongs to another model.
    """
    pretrained.fill(model, checkpoint.weights, str(checkpoint.folder / WEIGHTS))
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.optimizer.items():
        name, _, quantity = key.rpartition("/")
        state.setdefault(name, {})[quantity] = tensor
    names = _names(model)
    layout = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in layout["param_groups"] for index in group["params"]]
    found = {i: state[names[id(p)]] for i, p in zip(indices, parameters, strict=True) if names[id(p)] in state}
    optimizer.load_state_dict({**layout, "state": found})


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by "parameter/quantity"."""
    names = _names(model)
    return {
        f"{names[id(parameter)]}/{quantity}": tensor.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for quantity, tensor in state.items()
    }


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _link(source: Path, target: Path) -> None:
    """A second name for a file, which takes no room; a copy where the file system has no such thing."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
