"""Where a run's numbers go beside its CSV file: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ssmzoo.checkpoints.weights import skeleton
from ssmzoo.model import SequenceModel
from ssmzoo.train.config import TrainConfig

TENSORBOARD = "tensorboard"  # its folder in a run's
SECONDS, SIZE = 0.5, 1024  # of measuring products, and of the matrices


class Board(Protocol):
    """Takes the numbers of steps."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard's event files in the run's folder. Numbers after ``step``, of a run that stopped, count no more."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1 if step else None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project ``ssmzoo``, under the name of its folder, which goes on where it stopped."""

    def __init__(self, run: Path, settings: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project="ssmzoo", name=run.name, id=run.name, resume="allow", dir=str(run), config=dict(settings)
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def boards_of(config: TrainConfig, run: Path, step: int) -> list[Board]:
    """Those that the settings ask for, for a run that goes on after a step."""
    found: list[Board] = [TensorBoard(run, step)] if config.log.tensorboard else []
    return [*found, WeightsAndBiases(run, config.to_dict())] if config.log.wandb else found


class Meter:
    """How much of the machine a training uses.

    Model-FLOP utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is the FLOPs that the model's
    definition asks for, forward and twice that backward, over what the machine could do meanwhile. That is measured
    here, by products of large matrices in the precision of the training, and not taken from a data sheet.

    Args:
        model: what is trained, or a model of the same config.
        config: the settings of the training.
        device: where.
        processes: on how many devices like this one. On CPUs each counts as one of its own.
    """

    def __init__(self, model: SequenceModel, config: TrainConfig, device: torch.device, processes: int):
        whole = skeleton(model.config, torch.device("meta"), None)
        self.flops = 3 * whole.flops_per_token(config.length)  # a token
        self.limit = processes * product_rate(device, torch.float32 if config.precision == "fp32" else torch.bfloat16)
        self._device = device

    def of(self, tokens_per_second: float) -> dict[str, float]:
        """The columns ``utilisation``, from 0 to 1, and ``memory_gb``, this process's highest so far."""
        used = tokens_per_second * self.flops / self.limit
        return {"utilisation": float(f"{used:.4g}"), "memory_gb": float(f"{memory(self._device) / 1e9:.4g}")}


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of this process's products of large matrices: the best of those in half a second."""
    a = torch.randn(SIZE, SIZE, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best


def memory(device: torch.device) -> int:
    """The most bytes that PyTorch has had on a GPU, or this process in the CPU's memory; 0 where no system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
