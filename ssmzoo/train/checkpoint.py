"""Checkpoints of a run: a folder each, which appears whole or not at all.

``checkpoints/step-0000250/`` holds the model as :mod:`ssmzoo.pretrained` writes it, the optimiser's state as
safetensors and the rest as YAML. Random numbers need no state: all of a step's follow from the seed and the
step's number.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from ssmzoo import files, pretrained
from ssmzoo.checkpoints import checksums, sharded
from ssmzoo.checkpoints.checksums import checkpoints
from ssmzoo.checkpoints.tensors import read_tensors, write_tensors
from ssmzoo.checkpoints.weights import fill
from ssmzoo.config import ModelConfig
from ssmzoo.files import sync
from ssmzoo.model import SequenceModel
from ssmzoo.pretrained import CONFIG, WEIGHTS

FOLDER, OPTIMIZER, STATE, LOG = checksums.CHECKPOINTS, "optimizer.safetensors", "state.yaml", "log.csv"
TOKENIZER = "tokenizer.json"


class Checkpoint(NamedTuple):
    """What :func:`read` found: tensors by name, and the state of fp16's loss scaler, or None."""

    folder: Path
    step: int
    config: ModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scaler: dict[str, Any] | None
    without: list[str]  # trainable parameters that had no gradient yet, and so no optimiser state
    sequences: int | None  # that all processes together have learned from; None in checkpoints of earlier versions


def write(
    run: Path,
    step: int,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    scaler: dict[str, Any] | None,
    keep: int,
    sequences: int,
) -> None:
    """Adds a checkpoint to a run, renews the run's model files, and removes all but the newest ``keep``.

    Raises:
        OSError: a file cannot be written, as on a full disk; the checkpoints before it are as they were.
    """
    folder = run / FOLDER / f"step-{step:07d}"
    if not folder.exists():  # otherwise the run was stopped again before its first step
        temporary = folder.with_name(f".{folder.name}.tmp")
        try:
            _write_files(run, temporary, step, model, optimizer, scaler, sequences)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # half of it, as a full disk leaves
        sync(folder.parent)
    settle(run, folder, keep)


def _write_files(
    run: Path,
    folder: Path,
    step: int,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    scaler: dict[str, Any] | None,
    sequences: int,
) -> None:
    """All that a checkpoint holds, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    pretrained.save(model, folder)
    tensors = _optimizer_tensors(model, optimizer)
    held = {key.rpartition("/")[0] for key in tensors}
    without = [name for name, p in model.named_parameters() if p.requires_grad and name not in held]
    write_tensors(tensors, folder / OPTIMIZER)
    write_state(run, folder, step, scaler, sequences, without)
    checksums.seal(folder)


def write_state(
    run: Path, folder: Path, step: int, scaler: dict[str, Any] | None, sequences: int, without: list[str]
) -> None:
    """What a checkpoint holds beside model and tensors: ``state.yaml`` and a copy of the log."""
    state = {
        "step": step,
        "sequences": sequences,
        "scaler": scaler,
        "checked": True,
        "without_optimizer_state": without,
    }
    (folder / STATE).write_text(yaml.safe_dump(state))
    if (run / LOG).is_file():
        shutil.copyfile(run / LOG, folder / LOG)


def settle(run: Path, folder: Path, keep: int) -> None:
    """Renews a run's model files from its newest checkpoint, and removes all but the newest ``keep``."""
    renew(run, folder)
    prune(run, keep)


def prune(run: Path, keep: int) -> None:
    """Removes all checkpoints of a run but the newest ``keep``."""
    for old in checkpoints(run)[:-keep]:
        files.remove(old)


def renew(run: Path, folder: Path) -> None:
    """Gives a run the model files of a checkpoint, unless it has them."""
    if sharded.is_sharded(folder):
        sharded.consolidate(folder, run)
        return
    sources = {CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}
    if (run / TOKENIZER).is_file():
        sources[TOKENIZER] = run / TOKENIZER
    with contextlib.suppress(ValueError):  # damaged files of the run are replaced
        if checksums.check(run) == {name: checksums.checksum(path) for name, path in sources.items()}:
            return
    checksums.install(run, {name: partial(files.link, path) for name, path in sources.items()})


def read(run: Path, *, tensors: bool = True, check: bool = True) -> Checkpoint:
    """A run's newest checkpoint.

    Args:
        run: the run's folder.
        tensors: read these too where many processes wrote them, who also read them by themselves.
        check: compare its files with their checksums, which reads all of them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; says what to do.
    """
    folders = checkpoints(run)
    if not folders:
        raise FileNotFoundError(
            f"{run} has no checkpoint to continue from: start the run again, with the same --out or another"
        )
    folder = folders[-1]
    try:
        sums = checksums.check(folder) if check else {}
        state = yaml.safe_load((folder / STATE).read_text())
        if sums is None and state.get("checked"):
            raise ValueError(f"{checksums.SUMS} is missing")
        if int(state["step"]) != int(folder.name.removeprefix("step-")):
            raise ValueError(f"{STATE} is of step {state['step']}")
        return Checkpoint(
            folder,
            int(state["step"]),
            ModelConfig.from_yaml(folder / CONFIG),
            *_tensors(folder, tensors),
            state["scaler"],
            state.get("without_optimizer_state", []),
            state.get("sequences"),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        before = f"continue from the one before it, {folders[-2].name}" if len(folders) > 1 else "start the run again"
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint {folder} is damaged: delete it to {before}. ({reason})") from None


@contextlib.contextmanager
def telling(run: Path, what: str, step: int, command: str) -> Iterator[None]:
    """Errors of the file system, such as a full disk, say what is lost and how to go on.

    Args:
        run: the run's folder.
        what: what could not be done.
        step: at which it was to be done.
        command: goes on with the run.
    """
    try:
        yield
    except OSError as error:
        saved = checkpoints(run)
        way = f"continue from {saved[-1].name} with: {command}" if saved else "start it again"
        raise OSError(
            error.errno,
            f"{error.strerror or error}: the run {run} could not {what} at step {step}; once that is mended {way}",
        ) from None


def _tensors(folder: Path, wanted: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the optimiser's state."""
    if not sharded.is_sharded(folder):
        return read_tensors(folder / WEIGHTS), read_tensors(folder / OPTIMIZER)
    if not wanted:
        return {}, {}
    return sharded.read_whole(folder, sharded.WEIGHTS_KIND), sharded.read_whole(folder, sharded.OPTIMIZER_KIND)


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """That of the weights, float32 or float64."""
    dtypes = [tensor.dtype for tensor in checkpoint.weights.values()]
    if not dtypes:
        dtypes = [meta.properties.dtype for meta in sharded.stored_keys(checkpoint.folder).values()]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def restore(checkpoint: Checkpoint, model: SequenceModel, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's weights and optimiser state back; settings such as the learning rate stay.

    Raises:
        ValueError: it belongs to another model.
    """
    fill(model, checkpoint.weights, str(checkpoint.folder / WEIGHTS))
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.optimizer.items():
        name, _, quantity = key.rpartition("/")
        state.setdefault(name, {})[quantity] = tensor
    _check_state(checkpoint, model, state)
    names = _names(model)
    layout = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in layout["param_groups"] for index in group["params"]]
    found = {i: state[names[id(p)]] for i, p in zip(indices, parameters, strict=True) if names[id(p)] in state}
    optimizer.load_state_dict({**layout, "state": found})


def _check_state(checkpoint: Checkpoint, model: nn.Module, state: dict[str, dict[str, Tensor]]) -> None:
    """The optimiser's tensors are those that AdamW has after the checkpoint's steps.

    Raises:
        ValueError: naming the first that is missing, unexpected or of another shape.
    """
    path = checkpoint.folder / OPTIMIZER
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in state:
        if name not in parameters:
            raise ValueError(f"{path} does not fit the model: it has state of an unknown parameter {name!r}")
    for name, parameter in parameters.items():
        if name not in state:
            if checkpoint.step > 0 and name not in checkpoint.without:
                raise ValueError(f"{path} is incomplete: it has no state of the parameter {name}")
            continue
        shapes = {"step": torch.Size(()), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        for quantity in sorted(shapes.keys() | state[name].keys()):
            found, wanted = state[name].get(quantity), shapes.get(quantity)
            if found is None or found.shape != wanted or not found.is_floating_point() or found.isnan().any():
                got = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                expected = "nothing" if wanted is None else f"numbers of shape {tuple(wanted)}"
                raise ValueError(f"{path} does not fit the model: {name}/{quantity} must be {expected}; it is {got}")


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
