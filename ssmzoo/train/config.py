"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ssmkernels.core.names import unknown
from ssmzoo.config import ModelConfig
from ssmzoo.options import convert
from ssmzoo.train.settings import GROUPS, LogConfig, ParallelConfig, group_of, merged
from ssmzoo.yaml_text import dump_yaml


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. The defaults suit the tiny byte models on two CPU cores.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences in one forward pass of one process; a step sees batch_size · accumulate ·
            processes.
        length: tokens of a sequence; the most that a classifier's may have.
        accumulate: forward passes whose gradients are added up into one step.
        lr: peak learning rate. Weights with a rate of their own (S4's A, B and Δ) keep theirs.
        min_lr_ratio: every rate ends at this fraction of its peak.
        warmup_steps: steps of linear warm-up before the cosine; a twentieth of the steps if None.
        weight_decay: AdamW's, on matrices: see :mod:`ssmzoo.train.optimizer`.
        betas: AdamW's decay rates of the two moments.
        clip: the gradient's largest norm; 0 for none.
        seed: of weights, batches and dropout.
        precision: "fp32", or mixed: "bf16", "fp16".
        cpu: train on the CPU even where there is a GPU.
        tokenizer: path of a `tokenizers` JSON file; text is read as bytes if None. A corpus has its own.
        data: the folder of a corpus, where no data are given otherwise: see :mod:`ssmzoo.train.corpora`.
        mixture: weights of a corpus's sources, by their names; sources without one are left out. If None, each sequence
            comes once before any comes again.
        objective: what a language model learns: "causal", the next token; or "masked", tokens that are masked, as BERT
            does: see :mod:`ssmzoo.train.masked`. If None, "masked" for a model that is ``bidirectional``.
        mask_rate: the share of each sequence's tokens that a model learns to tell, with "masked".
        mask_random: the share of these that are replaced by another id and not by the mask.
        mask_kept: the share of these that are not replaced.
        mask_id: the id of the mask; if None, that of the tokenizer's "[MASK]" or "<mask>", else the id after all
            others.
        validation: fraction of the data that is held out, unless a classifier has a file for that.
        eval_every: steps between evaluations on held-out data; one more stands at the start and at the end.
        eval_batches: batches in one evaluation, always the same ones.
        save_every: steps between checkpoints; one more stands at the end.
        keep: newest checkpoints to keep.
        sample_every: steps between samples of what a language model writes, printed as it learns; 0 for one at the end.
        checkpointing: activations inside of blocks are not kept for the backward pass, which computes them again.
        compile: each block is compiled by ``torch.compile``.
        parallel: how the run is spread over processes, a :class:`~ssmzoo.train.settings.ParallelConfig` or a mapping.
            If None, over those that it is started in, each with a copy of the model.
        log: where its numbers go, a :class:`~ssmzoo.train.settings.LogConfig` or a mapping.
    """

    steps: int = 1000
    batch_size: int = 8
    length: int = 256
    accumulate: int = 1
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    cpu: bool = False
    tokenizer: str | None = None
    data: str | None = None
    mixture: dict[str, float] | None = None
    objective: Literal["causal", "masked"] | None = None
    mask_rate: float = 0.15
    mask_random: float = 0.1
    mask_kept: float = 0.1
    mask_id: int | None = None
    validation: float = 0.05
    eval_every: int = 100
    eval_batches: int = 8
    save_every: int = 250
    keep: int = 2
    sample_every: int = 0
    checkpointing: bool = False
    compile: bool = False
    parallel: ParallelConfig | None = None
    log: LogConfig = LogConfig()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            if field.name in GROUPS:
                object.__setattr__(self, field.name, group_of(field.name, getattr(self, field.name)))
                continue
            value = convert(f"training setting `{field.name}`", getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        betas = [convert("training setting `betas`", beta, float) for beta in self.betas]
        if self.mixture is not None:
            object.__setattr__(self, "mixture", _weights(self.mixture))
        rules = [
            (("steps", "batch_size", "length", "accumulate"), lambda v: v >= 1, "at least 1"),
            (("eval_every", "eval_batches", "save_every", "keep"), lambda v: v >= 1, "at least 1"),
            (("lr",), lambda v: v > 0, "above 0"),
            (("min_lr_ratio",), lambda v: 0 <= v <= 1, "from 0 to 1"),
            (("validation",), lambda v: 0 < v < 1, "between 0 and 1"),
            (("mask_rate",), lambda v: 0 < v <= 1, "above 0 and at most 1"),
            (("mask_random", "mask_kept"), lambda v: 0 <= v <= 1, "from 0 to 1"),
            (("mask_id",), lambda v: v is None or v >= 0, "at least 0, or None"),
            (
                ("mask_kept",),
                lambda v: v + self.mask_random <= 1,
                f"at most 1 together with `mask_random`={self.mask_random}",
            ),
            (("weight_decay", "clip", "seed", "sample_every"), lambda v: v >= 0, "at least 0"),
            (
                ("betas",),
                lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in betas),
                "two numbers in [0, 1)",
            ),
            (
                ("warmup_steps",),
                lambda v: v is None or 0 <= v <= self.steps,
                f"from 0 to `steps`={self.steps}, or None",
            ),
        ]
        for names, fits, expected in rules:
            for name in names:
                if not fits(getattr(self, name)):
                    raise ValueError(f"training setting `{name}` must be {expected}; got {getattr(self, name)!r}")
        object.__setattr__(self, "betas", tuple(betas))

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return self.steps // 20 if self.warmup_steps is None else self.warmup_steps

    def learns_masked(self, model: ModelConfig) -> bool:
        """Whether a model learns masked tokens with these settings."""
        if model.output != "tokens":
            return False
        return model.bidirectional if self.objective is None else self.objective == "masked"

    @classmethod
    def of(cls, *settings: Mapping[str, Any]) -> TrainConfig:
        """From mappings such as a model config's ``train``; the later one wins.

        Raises:
            ValueError, TypeError: an unknown setting, with what exists and the nearest, or a bad value.
        """
        found = merged(*settings)
        for key in found:
            if key not in FIELDS:
                raise ValueError(unknown("training setting", key, FIELDS))
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML takes it."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    def to_yaml(self) -> str:
        """Itself as YAML."""
        return dump_yaml(self.to_dict())


def _weights(mixture: Mapping[str, Any]) -> dict[str, float]:
    """Weights by the names of sources, checked."""
    found = {
        str(name): float(convert(f"training setting `mixture.{name}`", weight, float))
        for name, weight in mixture.items()
    }
    for name, weight in found.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"training setting `mixture.{name}` must be finite and at least 0; got {weight}")
    if not sum(found.values()):
        raise ValueError(f"training setting `mixture` must have a weight above 0; got {found}")
    return found


FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))
MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a run → those of the training, and overrides of the model's config (dotted as they are).

    Raises:
        ValueError: a key that is neither, with what exists and the nearest.
    """
    training: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for key, value in settings.items():
        if key in FIELDS:
            training[key] = value
        elif key.partition(".")[0] in ("mixture", *GROUPS):
            group, _, name = key.partition(".")
            training.setdefault(group, {})[name] = value
        elif key.partition(".")[0] in MODEL_FIELDS:
            model[key] = value
        else:
            raise ValueError(unknown("setting", key, [*FIELDS, *MODEL_FIELDS]))
    return training, model
