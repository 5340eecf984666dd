"""A run from its first check to its sample: what ``ssmzoo train`` does, for use in Python."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssmzoo.building import build
from ssmzoo.config import ModelConfig, load_config, model_folder
from ssmzoo.files import replacing
from ssmzoo.model import SequenceModel
from ssmzoo.pretrained import CONFIG, load
from ssmzoo.screen import Screen
from ssmzoo.train import checkpoint
from ssmzoo.train.checkpoint import TOKENIZER
from ssmzoo.train.checks import (
    check_empty,
    check_kind,
    check_length,
    check_masking,
    check_names,
    check_packages,
    check_size,
    check_trainable,
    check_vocabulary,
)
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.data import Data, load_ids, load_text
from ssmzoo.train.labelled import LabelledData, load_labelled
from ssmzoo.train.lock import locked
from ssmzoo.train.log import Log
from ssmzoo.train.loop import Trainer
from ssmzoo.train.masked import MaskedData, masked_data, masking_of
from ssmzoo.train.output import Output
from ssmzoo.train.record import IDS, DataSource, Record, describe, read_record, write_record
from ssmzoo.train.repair import clear, complete, repair
from ssmzoo.train.sample import continued, filled
from ssmzoo.train.vocabulary import Vocabulary, open_vocabulary

if TYPE_CHECKING:
    from accelerate import Accelerator

PROMPT, SAMPLE = 200, 300  # bytes of the sample at the end of a run


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Attributes:
        model: the trained model, on the device that it was trained on.
        folder: config, weights, settings, log, curve and checkpoints.
        steps: steps taken in all.
        validation_loss: nats a token, a masked token, or a label, at the end.
        validation_bits: the same in bits a byte (a token where the data were ids; a masked token; a label).
        validation_accuracy: the fraction of labels that a classifier got right, or of masked tokens; None for a model
            of the next token.
        sample: a piece of held-out text and how the model goes on from it, or with masked tokens filled in by it; None
            where there was no text.
    """

    model: SequenceModel
    folder: Path
    steps: int
    validation_loss: float
    validation_bits: float
    validation_accuracy: float | None
    sample: str | None


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
        data: text files and folders; or token ids ``(n)``; or None for the Python standard library's source. For a
            classifier a ``.npz`` file, or two: see :func:`ssmzoo.train.labelled.load_labelled`.
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
    check_kind(model_config)
    accelerator = _accelerator(config)
    run = Path(out) if out is not None else _new_folder(name)
    check_names(run, describe(data))
    if accelerator.is_main_process:
        check_empty(run)
    loaded, vocabulary = _load(data, model_config, config)
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
        trainer = Trainer(start, loaded, config, run, accelerator, name)
        return _finish(trainer, vocabulary, quiet)


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
    check_packages("accelerate", "matplotlib")
    run = Path(folder)
    read_record(run)  # before a lock is made in a folder that holds no run
    # All processes of a run come here, and the first of them holds its lock.
    first = int(os.environ.get("RANK", "0")) == 0
    with locked(run) if first else contextlib.nullcontext():
        return _resume(run, data, quiet, settings, first)


def _resume(run: Path, data: DataSource, quiet: bool, settings: dict[str, Any], first: bool) -> Result:
    record = read_record(run)
    config = TrainConfig.of(record.settings, settings)
    if (run / TOKENIZER).is_file() and "tokenizer" not in settings:
        config = dataclasses.replace(config, tokenizer=str(run / TOKENIZER))
    found = checkpoint.read(run)
    if found.step >= config.steps:
        if first:
            complete(run, found, config.keep, record.model)
        raise ValueError(f"{run} is complete with its {found.step} steps; for more add --set steps={2 * found.step}")
    if data is None and record.data == IDS:
        raise ValueError(f"{run} was trained on an array of ids: give the same as `data`")
    loaded, vocabulary = _load(record.data if data is None else data, found.config, config)
    if loaded.train.fingerprint() != record.fingerprint:
        raise ValueError(f"the data of {run} have changed since it started: give the same, or start a new run")
    trainer = Trainer(build(found.config), loaded, config, run, _accelerator(config), record.model)
    trainer.restore(found)
    if trainer.accelerator.is_main_process:
        repair(run, found)
    if settings and trainer.accelerator.is_main_process:
        write_record(run, dataclasses.replace(record, settings={**record.settings, **settings}))
    return _finish(trainer, vocabulary, quiet)


def _new_folder(name: str) -> Path:
    """A folder by name and time, the same in all processes."""
    from accelerate.utils import broadcast_object_list

    return Path(*broadcast_object_list(["runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"]))


def run_name(model: str | os.PathLike[str]) -> str:
    """What a run of a named model, a YAML file or a folder is called."""
    name = Path(model).name
    return name.removesuffix(".yaml").removesuffix(".yml")


def _finish(trainer: Trainer, vocabulary: Vocabulary | None, quiet: bool) -> Result:
    """All the steps that are left, and the sample."""
    run, data, main = trainer.run, trainer.data, trainer.accelerator.is_main_process
    output = Output(sys.stdout)
    console = Screen(file=output, quiet=quiet or not main, soft_wrap=True)  # type: ignore[arg-type]
    what = "sequences" if isinstance(data, LabelledData) else "tokens"
    console.print(
        f"{trainer.name}: {trainer.model.num_parameters():,} parameters on {trainer.accelerator.device}, "
        f"{len(data.train):,} {what} to train on, {len(data.validation):,} held out; "
        f"writes to {run}"
    )
    if (run / checkpoint.FOLDER).is_dir():
        console.print(f"continues from step {trainer.step} of {trainer.config.steps}")

    def show_sample() -> str:
        assert vocabulary is not None
        model, seed = trainer.model, trainer.config.seed
        if isinstance(data, MaskedData):
            what, shown, text = filled(model, data, vocabulary, SAMPLE, seed)
        else:
            assert isinstance(data, Data)
            what, shown, text = continued(model, data, vocabulary, PROMPT, SAMPLE, seed)
        console.print(f"\n{what}\n")
        console.print(shown)
        return text

    if vocabulary is not None and main:
        trainer.on_sample = show_sample
    with contextlib.ExitStack() as stack:
        # Mixed precision wraps the model's forward.
        stack.callback(trainer.accelerator.unwrap_model, trainer.model, keep_fp32_wrapper=False)
        log = None
        if main:
            log = Log(
                run / checkpoint.LOG, data.unit, trainer.step, trainer.config.steps, console, bool(trainer.balance)
            )
            stack.enter_context(log)
        validation = trainer.fit(log, output)
    sample = None
    if vocabulary is not None:
        sample = show_sample()
        then = "" if isinstance(data, MaskedData) else f' Try: ssmzoo generate {run} "def "'
        console.print(f"All of it is in {run}.{then}")
    loss = validation["validation_loss"]
    accuracy = validation.get("validation_accuracy")
    return Result(trainer.model, run, trainer.step, loss, data.bits(loss), accuracy, sample)


def _load(
    data: DataSource, model_config: ModelConfig, config: TrainConfig
) -> tuple[Data | MaskedData | LabelledData, Vocabulary | None]:
    """The data, and the vocabulary where they are text; both checked against the model."""
    size, masked = model_config.vocab_size or 0, config.learns_masked(model_config)
    vocabulary = None
    if model_config.output == "classes":
        if isinstance(data, Tensor | np.ndarray):
            raise ValueError(
                "train: `data` of a classifier must be a .npz file with `inputs` and `labels`; got an array"
            )
        files = [data] if isinstance(data, str | os.PathLike) else data or []
        return load_labelled(files, model_config, config.length, config.validation), None
    check_length(model_config, config.length)
    if isinstance(data, Tensor | np.ndarray):
        loaded = load_ids(data, config.validation)
    else:
        vocabulary = open_vocabulary(config.tokenizer)
        check_vocabulary(vocabulary, size, masked)
        sources = [data] if isinstance(data, str | os.PathLike) else data
        loaded = load_text(sources, vocabulary, config.validation)
    check_size(loaded, config.length)
    if isinstance(data, Tensor | np.ndarray) and data.max() >= size:
        raise ValueError(f"train: `data` must hold ids below vocab_size={size}; got {int(data.max())}")
    return masked_data(loaded, masking_of(config, vocabulary, size)) if masked else loaded, vocabulary


def _accelerator(config: TrainConfig) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    if AcceleratorState._shared_state.get("distributed_type") == DistributedType.NO:
        # An earlier run in this process may have had another device or precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        gradient_accumulation_steps=config.accumulate,
        cpu=config.cpu,
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(f"train: accelerate's `distributed_type` must be NO, MULTI_CPU or MULTI_GPU; got {kind.value}")
    return accelerator
