"""What a run needs before its first step: data that fit the model, and the devices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ssmzoo.config import ModelConfig
from ssmzoo.train.checks import check_length, check_size, check_vocabulary
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.data import Data, load_ids, load_text
from ssmzoo.train.labelled import LabelledData, load_labelled
from ssmzoo.train.masked import MaskedData, masked_data, masking_of
from ssmzoo.train.record import DataSource
from ssmzoo.train.vocabulary import Vocabulary, open_vocabulary

if TYPE_CHECKING:
    from accelerate import Accelerator


def load_data(
    data: DataSource, model_config: ModelConfig, config: TrainConfig
) -> tuple[Data | MaskedData | LabelledData, Vocabulary | None]:
    """The data, and the vocabulary where they are text; both checked against the model.

    Raises:
        ValueError, FileNotFoundError: they do not fit.
    """
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


def accelerator_of(config: TrainConfig) -> Accelerator:
    """What runs the steps, on the devices and in the precision of a run.

    Raises:
        ValueError: the processes are started in a way that training does not know.
    """
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
