"""What Python and messages between ranks take in a step, besides what operators compute and links carry.

A few layers of the model train on so few tokens that next to nothing is computed. What a step takes beyond its plan is
then divided by its operators: Python, autograd and the dispatch of each. Over ranks it takes longer; what is beyond the
plan of that is divided by the messages. Ranks wait for one another at each message, and the longer they have
computed, the less they come to it at the same moment; so they compute something between layers, as in a step.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssmzoo.config import ModelConfig
from ssmzoo.footprint import footprint
from ssmzoo.model import SequenceModel
from ssmzoo.planning.devices import Device
from ssmzoo.planning.estimate import Task, estimate
from ssmzoo.planning.mesh import Mesh
from ssmzoo.planning.pieces import DTYPES
from ssmzoo.planning.training import Training

TOKENS = 16  # of a rank
LAYERS, NUMBERS = 4, 2**24  # of the model that is trained, at most
ROUNDS, STEPS = 7, 2
BUSY = (512, 256, 3)  # rows, channels and products between two layers: about what a small model computes there
STAND_IN = ModelConfig(d_model=128, n_layers=2, pattern=["mamba2", "attention"], vocab_size=256)


def few_layers(config: ModelConfig) -> ModelConfig:
    """The model with few layers; a small one of two kinds where these are large, and nobody sees what Python takes."""
    few = config if config.n_layers <= LAYERS else config.override({"n_layers": LAYERS})
    return few if footprint(few).parameters <= NUMBERS else STAND_IN


def ways_of(ranks: int) -> dict[str, Mesh]:
    """The meshes that are measured, by what is sent on them: "alone" first."""
    if ranks == 1:
        return {}
    return {
        "alone": Mesh(),
        "gradients": Mesh(data=ranks),
        "shard": Mesh(shard=ranks),
        "states": Mesh(context=ranks),
    }


@dataclasses.dataclass(frozen=True)
class Overheads:
    """Of one rank.

    Attributes:
        config: what was trained.
        tokens: of a rank.
        idle: seconds of a step of one rank by itself, with nothing between its layers.
        steps: seconds of a step with the same work between layers, by way.
        unable: why a way has none.
    """

    config: ModelConfig
    tokens: int
    idle: float
    steps: dict[str, float]
    unable: dict[str, str]

    def halfway(self, other: Overheads) -> Overheads:
        """Between these and others that were measured later."""
        steps = {way: (seconds + other.steps[way]) / 2 for way, seconds in self.steps.items()}
        return dataclasses.replace(self, idle=(self.idle + other.idle) / 2, steps=steps)


def overheads(config: ModelConfig, length: int, precision: str) -> Overheads:
    """On one of the ranks, which all measure the same at once.

    Args:
        config: of the model that is planned.
        length: of its sequences.
        precision: "fp32" or "bf16".
    """
    group = dist.group.WORLD
    assert group is not None
    config, tokens, dtype = few_layers(config), max(1, min(TOKENS, length // group.size())), DTYPES[precision]
    idle = Training(config, Mesh(), group, tokens, dtype)
    trained: dict[str, Training] = {}
    unable: dict[str, str] = {}
    for way, mesh in ways_of(group.size()).items():
        try:
            one = Training(config, mesh, group, tokens * mesh.context, dtype)
            _keep_busy(one.model)
            one.step()
            trained[way] = one
        # The same on all ranks; FSDP asserts what it asks of a model
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
            unable[way] = " ".join(str(error).split())[:200]
    taken = _taken(group, {"": idle, **trained})
    return Overheads(config, tokens, taken.pop(""), taken, unable)


def _taken(group: dist.ProcessGroup, trained: Mapping[str, Training]) -> dict[str, float]:
    """Medians of the seconds of a step; all take turns."""
    found: dict[str, list[float]] = {way: [] for way in trained}
    for turn in range(ROUNDS + 1):
        for way, training in trained.items():
            dist.barrier(group)
            start = time.perf_counter()
            for _ in range(STEPS):
                training.step()
            if turn:
                found[way].append((time.perf_counter() - start) / STEPS)
    return {way: statistics.median(seconds) for way, seconds in found.items()}


class _Busy(torch.autograd.Function):
    """Lets a tensor pass, and its gradient, after some products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        _products(a, b)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _products(*ctx.saved_tensors)
        return grad, None, None


def _products(a: Tensor, b: Tensor) -> None:
    for _ in range(BUSY[2]):
        a @ b


def _keep_busy(model: SequenceModel) -> None:
    rows, channels, _ = BUSY
    a, b = torch.zeros(rows, channels), torch.zeros(channels, 2 * channels)

    def after(_: nn.Module, given: Any, out: Any) -> Any:
        return (_Busy.apply(out[0], a, b), *out[1:])

    for block in model.blocks:
        block.register_forward_hook(after)


def with_overheads(device: Device, measured: Sequence[Overheads], precision: str) -> Device:
    """The device with the time of a call and of messages, of the slowest rank.

    Args:
        device: with its rates; its ``call`` is the least that a call takes.
        measured: by each rank.
        precision: "fp32" or "bf16".
    """
    first, ranks = measured[0], len(measured)

    def planned(device: Device, mesh: Mesh) -> float:
        task = Task(first.config, first.tokens * mesh.context, device, precision)
        return estimate(task, mesh, mesh.batches, False).step

    def beyond(device: Device, seconds: float, mesh: Mesh, changed: str, value: Any, base: float = 0.0) -> float:
        """What a step takes beyond its plan, for each of what the plan counts by this field."""
        one = planned(dataclasses.replace(device, **{changed: value}), mesh)
        least = planned(device, mesh)
        return (seconds - (least - base)) / (one - least) if one > least else 0.0

    none = dataclasses.replace(device, call=0.0, latency=0.0)
    call = beyond(none, max(each.idle for each in measured), Mesh(), "call", 1.0)
    device = dataclasses.replace(device, call=max(device.call, call))
    alone = planned(dataclasses.replace(device, latency=0.0), Mesh())
    waits: dict[str, float] = {}
    for way, mesh in list(ways_of(ranks).items())[1:]:
        if way not in first.steps:
            continue
        seconds = max(each.steps[way] - each.steps["alone"] for each in measured)
        kinds = ("states", "keys") if way == "states" else (way,)
        without = dataclasses.replace(device, latency=0.0, waits=waits)
        wait = beyond(without, seconds, mesh, "waits", {**waits, **dict.fromkeys(kinds, 1.0)}, alone)
        waits |= dict.fromkeys(kinds, max(wait, 0.0))
    lacks = "".join(f"; not measured: {way} ({reason})" for way, reason in first.unable.items())
    return dataclasses.replace(device, waits=waits, source=device.source + lacks)
