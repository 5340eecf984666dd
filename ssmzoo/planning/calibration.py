"""This machine as a device: what a thread of each rank reaches while all ranks work at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssmzoo.config import ModelConfig
from ssmzoo.devices import cpu_name
from ssmzoo.footprint import memory_of
from ssmzoo.planning.counting import BACKWARD, BACKWARD_FLOPS, ENDS, FORWARD
from ssmzoo.planning.devices import Device
from ssmzoo.planning.op_times import COLD, TOKENS, op_seconds
from ssmzoo.planning.overheads import Overheads, overheads, with_overheads
from ssmzoo.planning.pieces import DTYPES, parts_of
from ssmzoo.planning.ranks import on_ranks
from ssmzoo.planning.stopwatch import seconds

MOST_RANKS = 8
SENT = 2**20  # numbers that processes add up
MOST_BUFFERS = 64


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is measured: matrices, tensors and ops of a model's own sizes.

    Attributes:
        precision: "fp32" or "bf16".
        rows: tokens of a rank, as many as are worth it.
        width: of the model.
        ops: op → its sizes.
        config: the model, and ``length`` its sequences' tokens.
    """

    precision: str
    rows: int
    width: int
    ops: Mapping[str, Mapping[str, Any]]
    config: ModelConfig
    length: int


def shapes_of(config: ModelConfig, length: int, precision: str) -> Shapes:
    """Those of a model at a length."""
    rows = min(length, TOKENS)
    parts = parts_of(config, 1, rows, precision, "cpu")
    ops: dict[str, dict[str, Any]] = {}
    for piece in (*parts.blocks, parts.ends):
        ops |= piece.counts.sizes
    return Shapes(precision, rows, config.d_model, {op: found for op, found in ops.items() if found}, config, length)


def calibrated(config: ModelConfig, ranks: int, length: int, precision: str) -> Device:
    """This machine's CPU with one thread a rank, by some seconds of measurements for the ops of a model.

    Raises:
        ValueError: more ranks than a machine can stand for.
    """
    if ranks > MOST_RANKS:
        raise ValueError(
            f"--device this measures up to {MOST_RANKS} ranks; got {ranks}. Name a device to plan for more of them"
        )
    return device_of(on_ranks(ranks, measure, shapes_of(config, length, precision)), precision)


def device_of(measured: Sequence[Rates], precision: str) -> Device:
    """The device of which each rank has measured its own; the slowest rank counts, as others wait for it."""
    ranks, memory = len(measured), memory_of(torch.device("cpu"))
    link = min(each.link for each in measured)
    device = Device(
        "this",
        "cpu",
        math.inf if memory is None else memory / ranks,
        min(each.bandwidth for each in measured),
        {precision: min(each.matrix for each in measured)},
        min(each.matrix for each in measured),
        MOST_RANKS,
        link,
        link,
        max(each.latency for each in measured),
        max(each.call for each in measured),
        False,
        f"measured on this machine: {cpu_name()}, {ranks} {'rank' if ranks == 1 else 'ranks'} of one thread",
        {"matrix": 1.0, "memory": 1.0, "vector": 1.0, "link": 1.0},
        {key: min(each.ops[key] for each in measured) for key in measured[0].ops},
        {name: min(each.links[name] for each in measured) for name in measured[0].links},
    )
    return with_overheads(device, [each.overheads for each in measured], precision)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one rank has measured: per second, and seconds of a message and of a call.

    ``link`` and ``latency`` are those of a sum that all get, ``links`` those of other messages by what they are for.
    """

    matrix: float
    bandwidth: float
    call: float
    ops: dict[tuple[str, str], float]
    link: float
    latency: float
    links: dict[str, float]
    overheads: Overheads

    def halfway(self, other: Rates) -> Rates:
        """Between these and others that were measured later: the means of the times."""
        return Rates(
            _halfway(self.matrix, other.matrix),
            _halfway(self.bandwidth, other.bandwidth),
            (self.call + other.call) / 2,
            {key: _halfway(rate, other.ops[key]) for key, rate in self.ops.items()},
            _halfway(self.link, other.link),
            (self.latency + other.latency) / 2,
            {key: _halfway(rate, other.links[key]) for key, rate in self.links.items()},
            self.overheads.halfway(other.overheads),
        )


def _halfway(rate: float, other: float) -> float:
    return 1 / ((1 / rate + 1 / other) / 2) if math.isfinite(rate) else rate


def measure(shapes: Shapes) -> Rates:
    """On one of the ranks, which all measure the same at once."""
    dtype, rows, width = DTYPES[shapes.precision], shapes.rows, shapes.width
    weight = torch.randn(2 * width, width, dtype=dtype)
    several = max(2, min(MOST_BUFFERS, COLD // (rows * width * dtype.itemsize)))
    inputs = [torch.randn(rows, width, dtype=dtype) for _ in range(several)]
    gradients = [torch.randn(rows, 2 * width, dtype=dtype) for _ in range(several)]

    def products() -> list[Tensor]:  # of a linear map, forward and backward
        pairs = zip(inputs, gradients, strict=True)
        return [y for x, g in pairs for y in (x @ weight.t(), g @ weight, g.t() @ x)]

    def sums() -> list[Tensor]:
        return [x + y for x, y in zip(inputs, reversed(inputs), strict=True)]

    matrix = several * 12 * rows * width**2 / seconds(products)
    bandwidth = several * 3 * inputs[0].nbytes / seconds(sums)
    small = torch.zeros(16, requires_grad=True)

    def chain() -> None:
        y = small
        for _ in range(CHAIN):
            y = y * 2.0
        y.sum().backward()

    call = seconds(chain) / (2 * CHAIN)
    ops: dict[tuple[str, str], float] = {}
    for op, given in shapes.ops.items():
        forward, backward, both_ends, flops = op_seconds(op, given, dtype)
        if flops:
            ops[FORWARD, op] = flops / forward
            ops[BACKWARD, op] = BACKWARD_FLOPS * flops / backward
        if flops and both_ends:
            ops[ENDS, op] = 2 * flops / both_ends
    link, latency, links = math.inf, 0.0, {}
    ranks = dist.get_world_size()
    if ranks > 1:
        message, many = torch.zeros(1), torch.zeros(SENT // ranks * ranks)
        latency = _latency(lambda: [x @ weight.t() for x in inputs[:BETWEEN]], lambda: dist.all_reduce(message))
        link = 2 * many.nbytes * (ranks - 1) / ranks / seconds(lambda: dist.all_reduce(many))
        links = _links(many, ranks)
    beside = overheads(shapes.config, shapes.length, shapes.precision)
    return Rates(matrix, bandwidth, call, ops, link, latency, links, beside)


def _links(many: Tensor, ranks: int) -> dict[str, float]:
    """Bytes a second, by what is sent: gloo has a way of its own for each kind of message."""
    part = many[: len(many) // ranks].clone()
    parts = [torch.empty_like(part) for _ in range(ranks)]
    sent = part.nbytes * (ranks - 1)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # as PyTorch calls it from 2.13 on
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

    def shard() -> None:  # weights come twice, and gradients go once
        for _ in range(2):
            gather(many, part)
        scatter(part, many)

    def states() -> None:  # states come, and their gradients go
        dist.all_gather(parts, part)
        dist.all_to_all(parts, list(many.split(len(part))[:ranks]))

    def keys() -> None:
        dist.all_to_all_single(torch.empty_like(many[: ranks * len(part)]), many[: ranks * len(part)])

    return {
        "shard": 3 * sent / seconds(shard),
        "states": 2 * sent / seconds(states),
        "keys": sent / seconds(keys),
    }


CHAIN = 100  # operators, one after another
BETWEEN = 8  # products between two messages, about what a layer of a small model has


def _latency(compute: Callable[[], object], meet: Callable[[], object]) -> float:
    """Seconds that a message adds to what ranks compute before it.

    In a step ranks do not come at the same moment, gloo's threads have gone to sleep, and they take a core from what
    is computed. A message right after another would meet none of this.
    """

    def both() -> None:
        compute()
        meet()

    return max(seconds(both) - seconds(compute), 1e-6)
