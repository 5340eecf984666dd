"""What must hold before a run starts, each with an error that says what to do."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import torch

from ssmzoo.checkpoints.checksums import CHECKPOINTS, checkpoints
from ssmzoo.config import ModelConfig
from ssmzoo.files import LEFT_OVER
from ssmzoo.mixer import Mixer
from ssmzoo.model import SequenceModel
from ssmzoo.train import lock
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.data import Data
from ssmzoo.train.vocabulary import Bytes, Vocabulary

BEGUN = {lock.FILE, CHECKPOINTS, "config.yaml", "train.yaml", "tokenizer.json", "log.csv", "tensorboard", "wandb"}


def check_packages(*packages: str) -> None:
    """Optional packages are installed.

    Raises:
        ImportError: naming those that are not.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"training needs {' and '.join(missing)}: pip install 'ssmzoo[train]'")


def check_boards(config: TrainConfig) -> None:
    """The packages of the boards that a run's numbers go to are installed.

    Raises:
        ImportError: naming the first that is not.
    """
    for package in ("tensorboard", "wandb"):
        if getattr(config.log, package) and importlib.util.find_spec(package) is None:
            where = "'ssmzoo[logging]'" if package == "tensorboard" else package
            raise ImportError(f"training setting `log.{package}` needs the package {package}: pip install {where}")


def check_empty(run: Path) -> None:
    """A new run's folder is not in use: it is empty, or holds what a run left that died before its first checkpoint.

    Raises:
        ValueError: there is something else in it.
    """
    if not run.exists():
        return
    names = {path.name for path in run.iterdir()} if run.is_dir() else {""}
    names = {name for name in names if not LEFT_OVER.fullmatch(name)}
    begun = names & {lock.FILE, "train.yaml"} and names <= BEGUN and not checkpoints(run)
    if names and not begun:
        raise ValueError(f"{run} is not empty: continue its run with --resume {run}, or choose another --out")


DISTILLATION = "distill.yaml"


def check_alone(run: Path) -> None:
    """A run is no stage of a distillation.

    Raises:
        ValueError: it is.
    """
    if (run.parent / DISTILLATION).is_file() and (run / "train.yaml").is_file():
        raise ValueError(f"{run} is a stage of a distillation: continue it with `ssmzoo distill --resume {run.parent}`")


def check_names(run: Path, data: list[str] | str | None) -> None:
    """The paths that a run writes down are text.

    Raises:
        ValueError: naming the one that is not.
    """
    for what, path in [("out", str(run)), *(("data", path) for path in data or () if isinstance(data, list))]:
        try:
            path.encode()
        except UnicodeEncodeError:
            shown = path.encode(errors="backslashreplace").decode()
            raise ValueError(f"train: `{what}` must be a path in UTF-8; got {shown}: rename it") from None


def check_kind(config: ModelConfig) -> None:
    """The model goes from tokens to tokens, or is a classifier.

    Raises:
        ValueError: it is neither.
    """
    if config.output != "classes" and (config.output != "tokens" or config.d_input is not None):
        into = "features" if config.d_input is not None else "tokens"
        raise ValueError(
            f"train: `model` must be a language model, from tokens to tokens, or a classifier; this one goes from "
            f"{into} to {config.output}: train it with a loop of your own"
        )


def check_length(config: ModelConfig, length: int) -> None:
    """A sequence has no more tokens than the model has learned positions.

    Raises:
        ValueError: it has.
    """
    most = config.learned_positions
    if most is not None and length > most:
        raise ValueError(
            f"training setting `length` must be at most {most}, the model's `learned_positions`; got {length}: add "
            f"--set length={most}, or --set learned_positions={length} for another model"
        )


def check_trainable(model: SequenceModel, masked: bool) -> None:
    """No next token is predicted with the help of later ones, unless masked tokens are learned; the weights are precise
    enough to learn.

    Raises:
        ValueError: one of the two does not hold.
    """
    for name, module in model.named_modules():
        if model.config.output == "tokens" and not masked and isinstance(module, Mixer) and not module.causal:
            raise ValueError(
                f"train: `model` must be causal; {name} is bidirectional and sees the tokens that it should predict. "
                "It can learn masked tokens: add --set objective=masked"
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"train: `model` must have float32 weights; {name} is {parameter.dtype}: call model.float(), and set "
                "`precision` to bf16 or fp16 for half-precision compute"
            )


def check_masking(config: TrainConfig, masked: bool) -> None:
    """Nobody sets how tokens are masked where none are.

    Raises:
        ValueError: naming the setting.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.startswith("mask_") and value != field.default and not masked:
            raise ValueError(
                f"train: `{field.name}` has no meaning where the next token is learned; got {value}: leave it out, or "
                "add --set objective=masked"
            )


def check_vocabulary(vocabulary: Vocabulary, size: int, masked: bool) -> None:
    """A vocabulary, and with ``masked`` one more id for the mask of bytes, fits a model's ``vocab_size``.

    Raises:
        ValueError: it does not.
    """
    wanted = vocabulary.size + masked
    if isinstance(vocabulary, Bytes) and size != wanted:
        raise ValueError(
            f"text as bytes has {vocabulary.size} ids{', and the mask is another' if masked else ''}, and the model's "
            f"vocab_size is {size}: add --set vocab_size={wanted}, or name a tokenizer with --set tokenizer=FILE"
        )
    if vocabulary.size > size:
        raise ValueError(
            f"the tokenizer has {vocabulary.size} ids, and the model's vocab_size is {size}: "
            f"add --set vocab_size={vocabulary.size}"
        )


def check_size(data: Data, length: int) -> None:
    """Both parts of the data hold at least one sequence.

    Raises:
        ValueError: one is too short.
    """
    for part, tokens in (("training", data.train), ("validation", data.validation)):
        if len(tokens) <= length:
            raise ValueError(
                f"the {part} data has {len(tokens)} tokens, and one sequence takes {length + 1}: give more "
                f"data, or shorter sequences with --set length={max(1, (len(tokens) - 1) // 2)}"
            )
