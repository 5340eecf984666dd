"""A transformer distilled into a hybrid, stage by stage: what ``ssmzoo distill`` does, for use in Python."""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.core.names import unknown
from ssmzoo import pretrained
from ssmzoo.files import replacing
from ssmzoo.linearizing import linearize
from ssmzoo.linearizing.convert import zoo_model
from ssmzoo.model import SequenceModel
from ssmzoo.options import convert
from ssmzoo.train import checkpoint
from ssmzoo.train.alignment import STAGES, Alignment, Stage
from ssmzoo.train.checks import DISTILLATION, check_packages
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.loading import chosen_data, corpus_of, load_data
from ssmzoo.train.log import Row
from ssmzoo.train.loop import Trainer
from ssmzoo.train.record import IDS, DataSource, describe
from ssmzoo.train.run import Result, begin, go_on
from ssmzoo.yaml_text import dump_yaml, read_mapping

DEFAULTS = {"weight_decay": 0.0}  # which would draw the new mixers away from the weights that they begin with
TEACHER = "teacher"  # its folder, where it was given as a model


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A distillation.

    Attributes:
        teacher: the transformer: a name, folder or hub id, as :func:`ssmzoo.build` takes it.
        pattern: which layers of attention are replaced: see :func:`ssmzoo.linearize`.
        mixer: by what.
        options: of the new mixers.
        train: training settings of all stages: see :class:`ssmzoo.train.TrainConfig`; but weights do not decay by
            default.
        stages: training settings of each stage by its name. A stage that is left out is not taken.
    """

    teacher: str
    pattern: tuple[str, ...] = ("layers.*",)
    mixer: str = "mamba2"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    stages: dict[str, Any] = dataclasses.field(default_factory=lambda: {stage: {} for stage in STAGES})

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        pattern = (self.pattern,) if isinstance(self.pattern, str) else self.pattern
        for field in dataclasses.fields(self):
            value = pattern if field.name == "pattern" else getattr(self, field.name)
            object.__setattr__(self, field.name, convert(f"distill: `{field.name}`", value, hints[field.name]))
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(unknown("stage of distill", str(stage), STAGES))
        if not self.stages:
            raise ValueError(f"distill: `stages` must hold some of {', '.join(STAGES)}; got none")
        for stage in self.wanted:
            self.settings(stage)

    @property
    def wanted(self) -> list[Stage]:
        """The stages in their order."""
        return [stage for stage in STAGES if stage in self.stages]

    def settings(self, stage: str) -> TrainConfig:
        """Those of a stage."""
        return TrainConfig.of(
            DEFAULTS, self.train, convert(f"distill: `stages.{stage}`", self.stages[stage] or {}, dict)
        )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DistillConfig:
        """From a mapping, as a YAML file holds it.

        Raises:
            ValueError, TypeError: an unknown key, with what exists and the nearest, or a bad value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(unknown("key of distill", str(key), names))
        if "teacher" not in values:
            raise ValueError("distill: the key `teacher` is missing")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What :func:`distill` leaves.

    Attributes:
        model: the hybrid.
        folder: a folder for each stage, ``1-matrix``, ``2-hidden`` and ``3-logits``, which is a run like others. The
            last holds the hybrid.
        stages: what each stage ended with that was trained now: its distance is the ``validation_loss``, and the
            hybrid's loss as a language model is in ``validation_bits``. One that was complete already is not among
            them.
    """

    model: SequenceModel
    folder: Path
    stages: dict[str, Result]


class Distiller(Trainer):
    """Brings a student nearer to its teacher, by the distance of a stage."""

    def __init__(self, *args: Any, teacher: SequenceModel, layers: Sequence[int], stage: Stage):
        self.aligns: Callable[[SequenceModel], Alignment] = lambda student: Alignment(teacher, student, layers, stage)
        self.writes_text = stage == "logits"
        student, *_ = args
        self.aligns(student).freeze()  # before the optimiser is built
        super().__init__(*args)

    @property
    def command(self) -> str:
        return f"ssmzoo distill --resume {self.run.parent}"

    def learner(self) -> nn.Module:
        self.alignment = self.aligns(self.model).to(self.accelerator.device)
        return self.alignment

    def loss(self, learner: nn.Module, drawn: Any) -> Tensor:
        return typing.cast(Tensor, learner(drawn[:, :-1].to(self.accelerator.device)))

    def bits(self, loss: float) -> Row:
        return {}

    def validate(self, drawn: Any) -> Tensor:
        found = super().validate(drawn)
        found[3] = self.alignment(drawn[:, :-1].to(self.accelerator.device)) * found[1]
        return found

    def validated(self, nats: float, right: float, distance: float) -> Row:
        return super().validated(nats, right, distance) | {"validation_loss": distance}


def distill(
    config: DistillConfig | Mapping[str, Any] | str | os.PathLike[str],
    data: DataSource = None,
    out: str | os.PathLike[str] = "runs/distilled",
    *,
    teacher: SequenceModel | nn.Module | None = None,
    quiet: bool = False,
) -> Distilled:
    """Replaces attention in a transformer by recurrences, and teaches them to do what attention did.

    First each layer learns attention's matrix, then attention's output, and last the whole model learns the
    transformer's logits: see :mod:`ssmzoo.train.alignment`. Each stage is a training run.

    Args:
        config: a :class:`DistillConfig`, its mapping, or a YAML file of it.
        data: text files and folders, or token ids ``(n)``; None for the Python standard library's source.
        out: a folder, new or empty.
        teacher: the transformer itself, a model of ours or of transformers, in place of the config's ``teacher``. It is
            saved beside the runs, so that they can go on.
        quiet: print nothing.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: as :func:`ssmzoo.linearize` and
            :func:`ssmzoo.train.train`.
        Interrupted: Ctrl-C or SIGTERM; :func:`resume_distill` goes on.
    """
    check_packages("accelerate", "matplotlib")
    folder = Path(out)
    if isinstance(config, str | os.PathLike):
        config = read_mapping(Path(config))
    if not isinstance(config, DistillConfig):
        config = DistillConfig.of(config if teacher is None else {"teacher": TEACHER, **config})
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: continue with `ssmzoo distill --resume {folder}`, or choose another")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"distill: `WORLD_SIZE` must be 1, as it runs in one process; got {os.environ['WORLD_SIZE']}")
    _check_data(config, data)
    model = zoo_model(config.teacher if teacher is None else teacher)
    if model.config.output != "tokens" or model.config.d_input is not None:
        raise ValueError("distill: `teacher` must be a language model, from tokens to tokens")
    linearize(model, config.pattern, config.mixer, **config.options)  # refuses what cannot be, before anything is made
    lengths = {config.settings(stage).length: stage for stage in config.wanted}
    chosen, settings = chosen_data(data, config.settings(lengths[max(lengths)]))
    load_data(chosen, model.config, settings)  # likewise
    folder.mkdir(parents=True, exist_ok=True)
    if teacher is not None:
        pretrained.save(model, folder / TEACHER)
        config, model = dataclasses.replace(config, teacher=TEACHER), pretrained.load(folder / TEACHER)
    with replacing(folder / DISTILLATION) as path:
        path.write_text(dump_yaml({"data": describe(data), **_plain(config)}))
    return _stages(folder, config, data, model, quiet)


def resume_distill(folder: str | os.PathLike[str], data: DataSource = None, *, quiet: bool = False) -> Distilled:
    """Goes on with a distillation where it stopped: complete stages stay, one that has begun goes on.

    Args:
        folder: ``out`` of :func:`distill`.
        data: where the data are now; where they were, if None. Ids are needed again.
        quiet: print nothing.

    Raises:
        FileNotFoundError: no distillation there.
        ValueError: as :func:`distill`; or ids are missing.
    """
    folder = Path(folder)
    if not (folder / DISTILLATION).is_file():
        raise FileNotFoundError(f"{folder} is no distillation: there is no {DISTILLATION} in it")
    given = read_mapping(folder / DISTILLATION)
    found = given.pop("data", None)
    if data is None and found == IDS:
        raise ValueError(f"{folder} was trained on an array of ids: give the same as `data`")
    config = DistillConfig.of(given)
    _check_data(config, data)
    teacher = folder / TEACHER if config.teacher == TEACHER else config.teacher
    return _stages(folder, config, found if data is None else data, zoo_model(teacher), quiet)


def _check_data(config: DistillConfig, data: DataSource) -> None:
    """No stage is to learn from a corpus: layers are compared on sequences that are not packed."""
    for stage in config.wanted:
        folder = corpus_of(chosen_data(data, config.settings(stage))[0])
        if folder is not None:
            raise ValueError(f"distill: `data` must be text or ids; got the corpus {folder}, which only training takes")


def _stages(folder: Path, config: DistillConfig, data: DataSource, teacher: SequenceModel, quiet: bool) -> Distilled:
    """All stages that are left."""
    teacher.float()
    torch.manual_seed(config.settings(config.wanted[0]).seed)
    student, _, layers = linearize(teacher, config.pattern, config.mixer, **config.options)
    results: dict[str, Result] = {}
    for stage in config.wanted:
        run, settings = folder / f"{STAGES.index(stage) + 1}-{stage}", config.settings(stage)
        make = functools.partial(Distiller, teacher=teacher, layers=layers, stage=stage)
        if not checkpoint.checkpoints(run):
            results[stage] = begin(student, data, settings, run, f"{folder.name}: {stage}", quiet, make)
            student = results[stage].model
        elif (found := checkpoint.read(run)).step < settings.steps:
            results[stage] = go_on(run, data, quiet, {}, make)
            student = results[stage].model
        else:
            student = pretrained.load(found.folder)
        student.requires_grad_(True)
    return Distilled(student, folder, results)


def _plain(config: DistillConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "pattern": list(config.pattern)}
