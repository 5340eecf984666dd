"""The processes of a run as a mesh, and what a trainer asks of them, by the names that accelerate has for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ssmzoo.train.config import TrainConfig
from ssmzoo.train.mesh.alike import check_alike, settings_of
from ssmzoo.train.mesh.meeting import meet
from ssmzoo.train.settings import ParallelConfig


class Engine:
    """Runs the steps of a training over a mesh.

    Attributes:
        mesh: its dimensions are ``data``, ``shard``, ``context`` and ``tensor``; those of size 1 are there too.
        weights_mesh: the same, where ``shard`` and ``context`` are one dimension, ``weights``.
        share, shares: which share of a step's sequences this process sees, and how many there are.
        sync_gradients: whether the current forward pass is the last of its step.
    """

    scaler = None

    def __init__(self, config: TrainConfig):
        assert config.parallel is not None
        self.parallel: ParallelConfig = config.parallel
        self.device = _device(config)
        if not dist.is_initialized():
            backend = "gloo" if self.device.type == "cpu" else f"cpu:gloo,{self.device.type}:nccl"
            store, rank, ranks = meet()
            dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
        check_alike(settings_of(config))
        sizes = self.parallel.sizes
        self.mesh = init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        # Copies of the weights, and the processes that each copy is cut over
        cut = (sizes["data"], sizes["shard"] * sizes["context"], sizes["tensor"])
        self.weights_mesh = init_device_mesh(self.device.type, cut, mesh_dim_names=("data", "weights", "tensor"))
        self.process_index, self.num_processes = dist.get_rank(), dist.get_world_size()
        data, shard, self.part, _ = self.mesh.get_coordinate() or (0, 0, 0, 0)
        self.share, self.shares = data * sizes["shard"] + shard, sizes["data"] * sizes["shard"]
        self.parts = sizes["context"]
        self.copies = self.shares * self.parts  # processes whose gradients are averaged
        self.accumulated, self.sync_gradients = config.accumulate, True
        self._passes = 0
        self.precision = None if config.precision == "fp32" else torch.bfloat16
        self.norm: Callable[[], Tensor] = lambda: torch.zeros(())  # set by who knows how weights are cut

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the run's files."""
        return self.process_index == 0

    def prepare(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Stepper]:
        """The learner as it is, and the optimiser that steps once a step's passes are over."""
        return learner, Stepper(self, optimizer)

    @contextlib.contextmanager
    def accumulate(self, learner: nn.Module) -> Iterator[None]:
        """One of a step's passes forward and backward."""
        self._passes += 1
        self.sync_gradients = self._passes % self.accumulated == 0
        for module in learner.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(self.sync_gradients)
        waits = isinstance(learner, DistributedDataParallel) and not self.sync_gradients
        with learner.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor) -> None:
        """The gradient of a pass."""
        (loss / self.accumulated).backward()

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        """Scales the gradients to a norm of at most so much; returns what it was, over all processes."""
        norm = self.norm()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                local(parameter.grad).mul_(scale)
        return norm

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """The sum or mean of a tensor over all copies, on every process."""
        x = x.clone()
        dist.all_reduce(x)
        return x / (self.num_processes if how == "mean" else self.parallel.tensor)

    def wait_for_everyone(self) -> None:
        """Returns once all processes are here."""
        dist.barrier()

    def agreed(self, value: Any) -> Any:
        """The main process's value, on every process."""
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool) -> nn.Module:
        """The model, which nothing is wrapped around."""
        return model


class Stepper:
    """An optimiser that does nothing until the last of a step's passes."""

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer):
        self._engine, self._optimizer = engine, optimizer

    def step(self) -> None:
        if self._engine.sync_gradients:
            self._optimizer.step()

    def zero_grad(self) -> None:
        if self._engine.sync_gradients:
            self._optimizer.zero_grad()


def local(x: Tensor) -> Tensor:
    """What of a tensor is on this process."""
    return x.to_local() if hasattr(x, "to_local") else x


def _device(config: TrainConfig) -> torch.device:
    parallel = config.parallel
    if config.precision == "fp16":
        raise ValueError("training setting `precision` must be bf16 or fp32 with `parallel`; got 'fp16'")
    if parallel is not None and parallel.narrow and config.precision != "bf16":
        raise ValueError(f"training setting `parallel.narrow` needs `precision`='bf16'; got {config.precision!r}")
    if config.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
