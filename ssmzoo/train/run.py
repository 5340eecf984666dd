"""A run from its first check to its sample: what ``ssmzoo train`` does, for use in Python."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ssmzoo.building import build
from ssmzoo.checkpoints.checksums import checkpoints
from ssmzoo.config import ModelConfig, load_config, model_folder
from ssmzoo.files import replacing
from ssmzoo.model import SequenceModel
from ssmzoo.pretrained import CONFIG, load
from ssmzoo.train import checkpoint
from ssmzoo.train.accelerating import accelerator_of
from ssmzoo.train.checkpoint import TOKENIZER
from ssmzoo.train.checks import (
    check_alone,
    check_boards,
    check_empty,
    check_kind,
    check_masking,
    check_names,
    check_packages,
    check_trainable,
)
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.finish import Result, finish
from ssmzoo.train.job import first_here, is_spread, may_restart, process, restarted, together
from ssmzoo.train.loading import chosen_data, load_data
from ssmzoo.train.lock import locked
from ssmzoo.train.loop import Trainer
from ssmzoo.train.record import IDS, DataSource, Record, describe, read_record, write_record
from ssmzoo.train.repair import clear, complete, repair
from ssmzoo.train.settings import merged

Make = Callable[..., Trainer]  # takes what a Trainer does


def train(
    model: SequenceModel | ModelConfig | str | os.PathLike[str],
    data: DataSource = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    quiet: bool = False,
) -> Result:
    """Trains a language model on text or token ids, or a classifier on labelled sequences. Seeds PyTorch's global
    generator.

    Args:
        model: a model, whose weights are trained on from where they are; or a name, path or config, as
            :func:`ssmzoo.build` takes it.
        data: text files and folders; or the folder of a corpus; or token ids ``(n)``; or None for ``config.data``, or
            else the Python standard library's source. For a classifier a ``.npz`` file, or two: see
            :func:`ssmzoo.train.labelled.load_labelled`.
        config: settings, or some of them: the others come from the model config's ``train``, then from
            :class:`TrainConfig`.
        out: the run's folder, new or empty; ``runs/<name>-<time>`` if None.
        name: what the run is called in its folder's name and on its curve; the model's name if None.
        quiet: print nothing.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: data, settings or model that do not fit, a
            folder in use, a missing package, or a loss that is no number any more; each says what to do.
        Interrupted: Ctrl-C or SIGTERM; the run has been saved. It is a KeyboardInterrupt.
    """
    check_packages("accelerate", "matplotlib")
    if may_restart() and out is None:
        raise ValueError("train: `out` must be given with torchrun's --max-restarts, which goes on with the run there")
    if restarted() and out is not None and checkpoints(Path(out)):
        return go_on(Path(out), data, quiet, {}, Trainer)
    if name is None:
        name = run_name(model) if isinstance(model, str | os.PathLike) else "model"
    start: SequenceModel | ModelConfig
    if isinstance(model, SequenceModel | ModelConfig):
        start = model
    else:
        start = load(model) if model_folder(model) is not None else load_config(model)
    model_config = start.config if isinstance(start, SequenceModel) else start
    if not isinstance(config, TrainConfig):
        config = TrainConfig.of(model_config.train, config or {})
    return begin(start, data, config, out, name, quiet, Trainer)


def begin(
    start: SequenceModel | ModelConfig,
    data: DataSource,
    config: TrainConfig,
    out: str | os.PathLike[str] | None,
    name: str,
    quiet: bool,
    make: Make,
) -> Result:
    """A run from its first check to its sample; ``make`` gives its trainer."""
    make = trainer_of(config, make)
    check_boards(config)
    data, config = chosen_data(data, config)
    model_config = start.config if isinstance(start, SequenceModel) else start
    check_kind(model_config)
    accelerator = accelerator_of(config)
    run = Path(out) if out is not None else _new_folder(name, accelerator)
    check_names(run, describe(data))
    if accelerator.is_main_process:
        check_empty(run)
    loaded, vocabulary = load_data(data, model_config, config)
    if isinstance(start, ModelConfig):
        torch.manual_seed(config.seed)
        start = build(start)
    check_masking(config, config.learns_masked(model_config))
    check_trainable(start, config.learns_masked(model_config))
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
    with locked(run) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process:
            check_empty(run)  # once more: another process may have started here meanwhile
            clear(run)
            # The record comes first: by it a start that fails here is known as one that may be repeated.
            write_record(run, Record(name, describe(data), loaded.train.fingerprint(), config.to_dict()))
            if config.tokenizer is not None:
                shutil.copyfile(config.tokenizer, run / TOKENIZER)
            with replacing(run / CONFIG) as path:
                path.write_text(model_config.to_yaml())
        trainer = make(start, loaded, config, run, accelerator, name)
        return finish(trainer, vocabulary, quiet)


def resume(folder: str | os.PathLike[str], data: DataSource = None, *, quiet: bool = False, **settings: Any) -> Result:
    """Goes on with a run from its newest checkpoint, as if it had never stopped: on a CPU to the last bit.

    Args:
        folder: the run's.
        data: where its data are now; where they were, if None. A run on ids needs them again.
        quiet: print nothing.
        settings: training settings to change, such as ``steps=2000``.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: no run there, a damaged checkpoint, other data
            than before, and all that :func:`train` raises.
        Interrupted: as :func:`train`.
    """
    run = Path(folder)
    check_alone(run)
    return go_on(run, data, quiet, settings, Trainer)


def go_on(run: Path, data: DataSource, quiet: bool, settings: dict[str, Any], make: Make) -> Result:
    """A run from its newest checkpoint to its sample; ``make`` gives its trainer."""
    check_packages("accelerate", "matplotlib")
    read_record(run)  # before a lock is made in a folder that holds no run
    # All processes of a run come here, and the first of them holds its lock.
    first = process() == 0
    with locked(run) if first else contextlib.nullcontext():
        return _resume(run, data, quiet, settings, make, first)


def _resume(run: Path, data: DataSource, quiet: bool, settings: dict[str, Any], make: Make, first: bool) -> Result:
    record = read_record(run)
    config = TrainConfig.of(record.settings, settings)
    alone, make = make, trainer_of(config, make)
    check_boards(config)
    if (run / TOKENIZER).is_file() and "tokenizer" not in settings:
        config = dataclasses.replace(config, tokenizer=str(run / TOKENIZER))
    accelerator = accelerator_of(config)
    # One process on each machine is enough to look for damage, and all are told of it
    found = together(lambda: checkpoint.read(run, tensors=make is alone, check=first_here()))
    if found.step >= config.steps and first:
        complete(run, found, config.keep, record.model)
    if found.step >= config.steps and not restarted():
        raise ValueError(f"{run} is complete with its {found.step} steps; for more add --set steps={2 * found.step}")
    if data is None and record.data == IDS:
        raise ValueError(f"{run} was trained on an array of ids: give the same as `data`")
    data, config = chosen_data(record.data if data is None else data, dataclasses.replace(config, data=None))
    loaded, vocabulary = load_data(data, found.config, config)
    if loaded.train.fingerprint() != record.fingerprint:
        raise ValueError(f"the data of {run} have changed since it started: give the same, or start a new run")
    model = build(found.config).to(checkpoint.dtype_of(found))
    trainer = make(model, loaded, config, run, accelerator, record.model)
    trainer.restore(found)
    if trainer.accelerator.is_main_process:
        repair(run, found)
    if settings and trainer.accelerator.is_main_process:
        write_record(run, dataclasses.replace(record, settings=merged(record.settings, settings)))
    return finish(trainer, vocabulary, quiet)


def _new_folder(name: str, accelerator: Any) -> Path:
    """A folder by name and time, the same in all processes."""
    from accelerate.utils import broadcast_object_list

    folder = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if hasattr(accelerator, "agreed"):
        return Path("runs", accelerator.agreed(folder))
    return Path(*broadcast_object_list(["runs", folder]))


def trainer_of(config: TrainConfig, make: Make) -> Make:
    """What takes the steps: ``make``, or over a mesh of processes what stands in for a plain trainer there.

    Raises:
        ValueError: the mesh is not for such a run.
    """
    if not is_spread(config):
        return make
    from ssmzoo.train.mesh import MeshTrainer

    if make is not Trainer:
        raise ValueError("training setting `parallel` must be left out of a distillation, which has a teacher as well")
    return MeshTrainer


def run_name(model: str | os.PathLike[str]) -> str:
    """What a run of a named model, a YAML file or a folder is called."""
    name = Path(model).name
    return name.removesuffix(".yaml").removesuffix(".yml")
