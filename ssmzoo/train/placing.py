"""How a model's blocks run in training, and the precision of its losses."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.model import SequenceModel
from ssmzoo.train.config import TrainConfig


def with_blocks(model: SequenceModel, config: TrainConfig) -> SequenceModel:
    """The model, whose blocks keep their activations and are compiled as the settings say."""
    for block in model.blocks:
        if config.checkpointing:
            block.gradient_checkpointing = True
        if config.compile:
            block.compile()
    return model


def as_built(model: SequenceModel, config: TrainConfig) -> None:
    """Takes back what :func:`with_blocks` did."""
    for block in model.blocks:
        if config.checkpointing:
            block.gradient_checkpointing = False
        if config.compile:
            block._compiled_call_impl = None


def wide(logits: Tensor) -> Tensor:
    """Logits in the precision of sums."""
    return logits.to(precision(logits))
