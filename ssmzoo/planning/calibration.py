"""This machine as a device: what a thread of each rank reaches while all ranks work at once."""

from __future__ import annotations

import dataclasses
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssmkernels.bench.measure import SHORTEST
from ssmkernels.check.spec import spec_of
from ssmkernels.core.names import OPS
from ssmzoo.config import ModelConfig
from ssmzoo.devices import cpu_name
from ssmzoo.footprint import memory_of
from ssmzoo.parallel.adjoints import ADJOINTS
from ssmzoo.parallel.transitions import TRANSITIONS
from ssmzoo.planning.counting import BACKWARD, BACKWARD_FLOPS, ENDS, FORWARD, op_flops
from ssmzoo.planning.devices import Device
from ssmzoo.planning.overheads import Overheads, overheads, with_overheads
from ssmzoo.planning.pieces import DTYPES, parts_of
from ssmzoo.planning.ranks import on_ranks

MOST_RANKS = 8
SENT = 2**20  # numbers that processes add up
COLD = 2**26  # bytes of tensors that are used in turn, as those of a step are: no cache holds them all
MOST_BUFFERS, MOST_LAYERS = 64, 8
TRIES = 7
TOKENS = 2048  # of what is timed, at most


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

    matrix = several * 12 * rows * width**2 / _seconds(products)
    bandwidth = several * 3 * inputs[0].nbytes / _seconds(sums)
    small = torch.zeros(16, requires_grad=True)

    def chain() -> None:
        y = small
        for _ in range(CHAIN):
            y = y * 2.0
        y.sum().backward()

    call = _seconds(chain) / (2 * CHAIN)
    ops: dict[tuple[str, str], float] = {}
    for op, given in shapes.ops.items():
        forward, backward, both_ends, flops = _op(op, given, dtype)
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
        link = 2 * many.nbytes * (ranks - 1) / ranks / _seconds(lambda: dist.all_reduce(many))
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
        "shard": 3 * sent / _seconds(shard),
        "states": 2 * sent / _seconds(states),
        "keys": sent / _seconds(keys),
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

    return max(_seconds(both) - _seconds(compute), 1e-6)


def _seconds(call: Callable[[], object]) -> float:
    """The median of some samples of at least a few milliseconds; the ranks begin the first together."""
    call()
    start = time.perf_counter()
    call()
    repeats = torch.tensor([max(1.0, SHORTEST // max(time.perf_counter() - start, 1e-6))])
    dist.all_reduce(repeats, dist.ReduceOp.MAX)
    taken = []
    for _ in range(TRIES):
        start = time.perf_counter()
        for _ in range(int(repeats)):
            call()
        taken.append((time.perf_counter() - start) / int(repeats))
    return statistics.median(taken)


def _op(op: str, given: Mapping[str, Any], dtype: torch.dtype) -> tuple[float, float, float, float]:
    """Seconds of an op's forward and backward pass at these sizes, and of what a part leaves and asks where sequences
    are cut, 0 where that is not found by itself; and the FLOPs of the first."""
    spec = spec_of(op)
    short = {"l": min(given["l"], TOKENS)} if "l" in given else {}
    short |= {"length": min(given["length"], TOKENS)} if "length" in given else {}
    plain = {
        key: False if isinstance(spec.base[key], bool) else None for key in ("packed", "state") if key in spec.base
    }
    case = spec.case({**spec.bench, **given, **short, **plain})
    call, declared = spec.function(), OPS[op].declared
    # As layers do, each call has inputs of its own, and what is kept of all waits for the backward passes
    first = spec.inputs(case, dtype, "cpu", 0)
    size = sum(x.nbytes for x in first.values() if isinstance(x, Tensor))
    several = max(2, min(MOST_LAYERS, COLD // max(size, 1)))
    layers = [first, *(spec.inputs(case, dtype, "cpu", seed) for seed in range(1, several))]
    leaves = [[x.requires_grad_() for x in inputs.values() if _differentiable(x)] for inputs in layers]

    def forwards() -> list[Tensor]:
        every = [call(**inputs) for inputs in layers]
        return [found if isinstance(found, Tensor) else found[0] for found in every]

    gradient = torch.ones_like(forwards()[0])

    def both() -> None:
        for y, of in reversed(list(zip(forwards(), leaves, strict=True))):
            torch.autograd.grad(y, of, gradient, allow_unused=True)

    whole, forward = _seconds(both) / several, _seconds(forwards) / several
    flops = op_flops(op, _taken(declared, first))[0]
    both_ends = _ends(op, {name: x.detach() if isinstance(x, Tensor) else x for name, x in first.items()}, gradient)
    return forward, max(whole - forward, 1e-9), both_ends, flops


def _ends(op: str, inputs: Mapping[str, Any], gradient: Tensor) -> float:
    """Seconds of both ends of a part: what it leaves and what it asks (:mod:`ssmzoo.parallel.adjoints`), or the first
    alone with its gradient (:mod:`ssmzoo.parallel.left`)."""
    if len(gradient) > 1 or op not in TRANSITIONS:
        return 0.0
    function = spec_of(op).function()
    bound = inspect.signature(function).bind(**inputs)
    bound.apply_defaults()
    borders = torch.tensor([0, gradient.shape[1]], dtype=torch.int32)
    call = {**bound.arguments, "cu_seqlens": borders, "return_final_state": True}
    if op in ADJOINTS and ADJOINTS[op].can(call):
        adjoint = ADJOINTS[op]

        @torch.no_grad()
        def both() -> None:
            adjoint.found(function, call, True)
            adjoint.asked(call, gradient)

        return _seconds(both)
    if not TRANSITIONS[op].summed:
        return 0.0
    shapes, _, wide = TRANSITIONS[op].like(call)
    call = {key: x.requires_grad_() if _differentiable(x) else x for key, x in call.items()}
    if "initial_angle" in call:
        call["initial_angle"] = torch.zeros(shapes[1], dtype=wide)

    def left() -> None:
        E, M = TRANSITIONS[op].found(function, call)
        sum(x.sum() for x in (*E, *M)).backward()  # type: ignore[union-attr]

    return _seconds(left)


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _taken(declared: Any, inputs: Mapping[str, Any]) -> list[Any]:
    """What implementations take of the public arguments; a causal attention's reach is -1 to 0."""
    if declared.name == "attention":
        inputs = {**inputs, "left": -1, "right": 0 if inputs["causal"] else -1}
    return [inputs.get(name) for name in declared.takes]
