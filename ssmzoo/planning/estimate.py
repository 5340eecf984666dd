"""One mesh: the memory of a processor, the time of a step, and where it goes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from ssmzoo.config import ModelConfig
from ssmzoo.footprint import footprint
from ssmzoo.parallel.adjoints import ADJOINTS
from ssmzoo.parallel.transitions import TRANSITIONS
from ssmzoo.planning.counting import BACKWARD, ENDS, FORWARD, Counts, Gauge, Work
from ssmzoo.planning.devices import Device
from ssmzoo.planning.links import Traffic, traffic, weights_of_one
from ssmzoo.planning.memory import HALF, MOMENTS, WIDE, Memory, memory
from ssmzoo.planning.mesh import Mesh
from ssmzoo.planning.pieces import Parts, Piece, parts_of

COPIES = (
    2  # bytes that are read and written where a gathered weight, or a gradient, is taken out of a flat buffer or put in
)
MATRICES = {op for op, adjoint in ADJOINTS.items() if adjoint.matrices}
WITH_ENDS = {*ADJOINTS, *(op for op, transition in TRANSITIONS.items() if transition.summed)}
HIDDEN = 0.9  # of the computation, behind which communication that may wait can hide


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step costs on a mesh.

    Attributes:
        mesh: the processors.
        checkpointing: of every layer.
        batch: sequences of a step, on all processors together.
        memory: of one processor.
        seconds: of a step, by what takes them.
        traffic: what a processor sends, by why.
        flops: of a step, on all processors together, without what checkpointing computes again.
        tokens: of a step.
        fits: into a processor's memory.
        utilisation: the share of the data sheet's matrix rate that ``flops`` make use of (PaLM's MFU, arXiv 2204.02311,
            appendix B).
    """

    mesh: Mesh
    checkpointing: bool
    batch: int
    memory: Memory
    seconds: dict[str, float]
    traffic: dict[str, Traffic]
    flops: float
    tokens: int
    fits: bool
    utilisation: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be planned: a model, the tokens of a sequence, a processor and the precision."""

    config: ModelConfig
    length: int
    device: Device
    precision: str
    gauge: Gauge = dataclasses.field(default_factory=Gauge, compare=False)
    cache: dict[tuple[int, int], Parts] = dataclasses.field(default_factory=dict, compare=False)

    @functools.cached_property
    def parameters(self) -> int:
        return footprint(self.config).parameters

    def parts(self, batch: int, length: int) -> Parts:
        """The pieces for so many sequences; counted once."""
        if (batch, length) not in self.cache:
            self.cache[batch, length] = parts_of(
                self.config, batch, length, self.precision, self.device.kind, self.gauge
            )
        return self.cache[batch, length]


def estimate(task: Task, mesh: Mesh, batch: int, checkpointing: bool) -> Estimate:
    """The memory and the time of a step.

    Args:
        task: what is planned.
        mesh: the processors.
        batch: sequences of a step, a multiple of the parts that they are dealt out to.
        checkpointing: of every layer.
    """
    device, precision = task.device, task.precision
    mine = batch // mesh.batches
    parts = task.parts(mine, -(-task.length // mesh.context))
    whole = task.parts(mine, task.length) if mesh.context > 1 else parts
    weights = weights_of_one(parts, mesh, task.parameters)
    room = memory(parts, mesh, precision, checkpointing, task.parameters)
    sent = traffic(parts, mesh, device, precision, checkpointing, weights)

    seconds: dict[str, float] = {}
    again = 0.0
    for piece, uncut in zip(parts.blocks, whole.blocks, strict=True):
        layers = len(piece.layers)
        for phase in (FORWARD, BACKWARD):
            one = _seconds(piece, uncut, mesh, device, precision, phase)
            for kind, time in one.items():
                seconds[kind] = seconds.get(kind, 0.0) + layers * time
            again += layers * sum(one.values()) * (checkpointing and phase == FORWARD)
    for kind, time in device.seconds(parts.ends.counts.work, precision).items():
        seconds[kind] = seconds.get(kind, 0.0) + time
    if again:
        seconds["layers computed again"] = again
    computed = sum(seconds.values())
    # AdamW reads a weight, its gradient and both moments, and writes all but the gradient
    moved = weights / mesh.shard * (2 * WIDE + 2 * MOMENTS + WIDE)
    seconds["optimizer"] = moved / (device.bandwidth * device.reached["memory"])
    if mesh.shard > 1:
        size = HALF[precision] or WIDE
        seconds["weights put together"] = (
            weights * (2 * size + WIDE) * COPIES / (device.bandwidth * device.reached["memory"])
        )
    seconds |= _exposed(sent, device, computed, seconds.get("attention", 0.0), sum(len(p.layers) for p in parts.blocks))

    flops = _flops(whole) * mesh.batches
    peak = device.matrix[precision] * mesh.size * sum(seconds.values())
    return Estimate(
        mesh,
        checkpointing,
        batch,
        room,
        seconds,
        sent,
        flops,
        batch * task.length,
        room.total <= device.memory,
        flops / peak,
    )


def _seconds(piece: Piece, uncut: Piece, mesh: Mesh, device: Device, precision: str, phase: str) -> dict[str, float]:
    """One layer on one processor, by what takes the time.

    Where sequences are cut, attention shares all pairs of query and key out evenly. Most linear recurrences have a sum
    at each end of a part, of as many FLOPs as they have themselves, and one more for what matrices do to a state in
    parts that are neither first nor last. The others take twice as long, as a part waits for a run of the one before
    it. A mixer that waits for a state, or sees whole sequences, takes as long as if nothing were cut.
    """
    work = _split(piece.counts, piece.split, mesh.tensor, phase)
    if mesh.context == 1:
        return device.seconds(work, precision)
    whole = _split(uncut.counts, uncut.split, mesh.tensor, phase)
    if piece.crossed.way != "ops":
        for item, number in _split(uncut.mixer, uncut.mixer, mesh.tensor, phase).items():
            work[item] = work.get(item, 0.0) + number
        for item, number in _split(piece.mixer, piece.mixer, mesh.tensor, phase).items():
            work[item] = work.get(item, 0.0) - number
        return device.seconds(work, precision)
    found = device.seconds(work, precision)
    if "attention" in found:
        found["attention"] = device.seconds(whole, precision)["attention"] / mesh.context
    found |= {kind: 2 * time for kind, time in found.items() if kind in TRANSITIONS.keys() - WITH_ENDS}
    both = {
        item._replace(phase=ENDS): (3 if mesh.context > 2 and item.kind in MATRICES else 2) * n
        for item, n in work.items()
        if phase == FORWARD and item.kind in WITH_ENDS
    }
    if both:
        found["ends of parts"] = sum(device.seconds(both, precision).values())
    return found


def _split(counts: Counts, split: Counts, tensor: int, phase: str) -> dict[Work, float]:
    """The work of a phase on one processor; each operator of mixers and MLPs is shared out."""
    found: dict[Work, float] = {}
    for item, number in counts.work.items():
        if item.phase == phase:
            inner = min(split.work.get(item, 0.0), number) if tensor > 1 else 0.0
            smaller = item._replace(flops=item.flops / tensor, bytes=item.bytes / tensor)
            for each, times in ((item, number - inner), (smaller, inner)):
                if times:
                    found[each] = found.get(each, 0.0) + times
    return found


def _exposed(
    sent: Mapping[str, Traffic], device: Device, computed: float, attention: float, layers: int
) -> dict[str, float]:
    """Seconds of communication that nothing hides.

    Gradients and sharded weights travel while layers compute, but for those of one layer; keys while attention computes
    on those that have come. Sums of the residual stream and states are waited for.
    """
    found = {}
    behind = {"gradients": HIDDEN * computed * 2 / 3, "shard": HIDDEN * computed, "keys": HIDDEN * attention}
    for name, each in sent.items():
        seconds = each.seconds
        if device.overlaps and name in behind:
            seconds = max(seconds - behind[name], seconds / (layers + 1) if name != "keys" else 0.0)
        if seconds:
            found[f"waiting: {name}"] = seconds
    return found


def _flops(parts: Parts) -> float:
    return sum(len(piece.layers) * piece.counts.flops() for piece in parts.blocks) + parts.ends.counts.flops()
