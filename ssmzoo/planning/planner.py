"""``ssmzoo.plan``: a training run on paper."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from typing import Any

from ssmkernels.core.names import unknown
from ssmzoo.config import ModelConfig
from ssmzoo.planning.calibration import calibrated
from ssmzoo.planning.devices import PRECISIONS, THIS, Device, device_named
from ssmzoo.planning.estimate import Estimate, Task, estimate
from ssmzoo.planning.mesh import Mesh, meshes, parse_mesh
from ssmzoo.pretrained import architecture

MOST_PROCESSORS, MOST_TOKENS = 4096, 2**28
RUNNERS_UP = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`plan` gives.

    Attributes:
        model: what was planned, as it was named.
        device: the processor.
        processors: how many.
        length: tokens of a sequence.
        precision: "fp32" or "bf16".
        parameters: of the model.
        best: the fastest mesh that fits; where none fits, the one that needs the least memory.
        others: the next best.
        short: bytes that each processor lacks; 0 where the best mesh fits.
        remedies: what would make it fit, the smallest change of each kind.
    """

    model: str
    device: Device
    processors: int
    length: int
    precision: str
    parameters: int
    best: Estimate
    others: tuple[Estimate, ...]
    short: float
    remedies: tuple[str, ...]

    def to_json(self) -> str:
        """All of it, with seconds, bytes and FLOPs as numbers; null for those that have no end, as one rank's link."""
        found = dataclasses.asdict(self)
        found["device"] |= {"rates": {" ".join(key): rate for key, rate in self.device.rates.items()}}
        for where, what in ((found["best"], self.best), *zip(found["others"], self.others, strict=True)):
            where |= {"step": what.step, "tokens_per_second": what.tokens_per_second}
            where["memory"]["total"] = what.memory.total
        return json.dumps(_finite(found), indent=2)


def _finite(found: Any) -> Any:
    """The same with None for infinite numbers, which JSON has not."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def plan(
    model: str | os.PathLike[str] | ModelConfig,
    gpus: int = 1,
    length: int = 4096,
    *,
    device: str | Device = "h100",
    batch: int | None = None,
    precision: str = "bf16",
    mesh: Mesh | str | None = None,
    checkpointing: bool | None = None,
) -> Plan:
    """Plans a training run: memory, time and the best mesh, without a processor of the kind.

    One layer of each kind runs on tensors without memory, with the kernels that the device would run. This counts the
    operators with their FLOPs and bytes, and every byte that lives at once. How these become seconds is in
    :mod:`ssmzoo.planning.devices`, what processors send one another in :mod:`ssmzoo.planning.links`, and what takes
    memory in :mod:`ssmzoo.planning.memory`, each with its sources.

    Args:
        model: a name, a YAML file, the folder of a trained or published model, or a config.
        gpus: processors, up to 4 096.
        length: tokens of a sequence, up to 2²⁸.
        device: a name of :data:`ssmzoo.planning.DEVICES`, or "this" or "cpu" for this machine's CPU with a thread for
            each rank, which is measured for some seconds; or a :class:`Device`.
        batch: sequences of a step, on all processors together; if None, one for each part that sequences are dealt out
            to, so that meshes are compared by tokens a second.
        precision: "bf16" for activations beside float32 weights, or "fp32".
        mesh: the only one to look at, such as ``"shard=8,context=2"``; all if None.
        checkpointing: of every layer; whichever is faster and fits if None.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; a mesh that does not suit the others; a
            sequence that the model cannot take.
    """
    name, config = _config(model)
    if config.quantization:
        raise ValueError("plan: `model` must not be quantised, as such weights are not trained")
    _check(gpus, length, batch, precision, checkpointing)
    given = parse_mesh(mesh) if isinstance(mesh, str) else mesh
    if given is not None and not isinstance(given, Mesh):
        raise TypeError(f"plan: `mesh` must be a Mesh, a text such as 'data=2,shard=4', or None; got {given!r:.80}")
    if given is not None and given.size != gpus:
        raise ValueError(f"plan: `mesh` {given} has {given.size} processors; `gpus` is {gpus}")
    if given is not None and batch is not None and batch % given.batches:
        raise ValueError(
            f"plan: `batch` must be a multiple of the {given.batches} parts that `mesh` {given} deals it out to; "
            f"got {batch}"
        )
    if given is not None and given.context > length:
        raise ValueError(f"plan: `mesh` {given} cuts sequences into more parts than `length`={length} has tokens")
    if given is not None and config.d_model % given.tensor:
        raise ValueError(
            f"plan: `mesh` {given} cannot share out the {config.d_model} channels of the model's `d_model`"
        )
    most = config.learned_positions
    if most is not None and length > most:
        raise ValueError(f"plan: `length` must be at most {most}, the model's `learned_positions`; got {length}")
    if isinstance(device, str) and device in THIS:
        place = calibrated(config, gpus, length, precision)
    elif isinstance(device, str):
        place = device_named(device)
    elif isinstance(device, Device):
        place = device
    else:
        raise TypeError(f"plan: `device` must be a name or a Device; got {type(device).__name__}")
    task = Task(config, length, place, precision)
    ranked = _ranked(task, gpus, batch, given, checkpointing)
    best = ranked[0]
    short = max(0.0, best.memory.total - place.memory)
    remedies = () if best.fits else _remedies(task, gpus, batch, given, checkpointing)
    others = tuple(each for each in ranked[1:] if each.fits or not best.fits)[:RUNNERS_UP]
    return Plan(name, place, gpus, length, precision, task.parameters, best, others, short, remedies)


def _config(model: Any) -> tuple[str, ModelConfig]:
    if isinstance(model, ModelConfig):
        return model.description or "a config", model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"plan: `model` must be a name, a path or a ModelConfig; got {type(model).__name__}")
    return os.fspath(model), architecture(model)


def _check(gpus: Any, length: Any, batch: Any, precision: Any, checkpointing: Any) -> None:
    for name, value, most in (("gpus", gpus, MOST_PROCESSORS), ("length", length, MOST_TOKENS)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"plan: `{name}` must be an int from 1 to {most}; got {value!r:.80}")
    if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or not 1 <= batch <= 2**20):
        raise ValueError(f"plan: `batch` must be an int from 1 to {2**20}, or None; got {batch!r:.80}")
    if precision not in PRECISIONS:
        raise ValueError(unknown("plan: `precision`", str(precision), PRECISIONS))
    if checkpointing is not None and not isinstance(checkpointing, bool):
        raise TypeError(f"plan: `checkpointing` must be True, False or None; got {checkpointing!r:.80}")


def _ranked(
    task: Task, processors: int, batch: int | None, given: Mesh | None, checkpointing: bool | None
) -> list[Estimate]:
    """Estimates of all meshes, the best first: those that fit by tokens a second, then the others by memory.

    Raises:
        ValueError: no mesh deals the batch out.
    """
    candidates = (
        [given] if given is not None else list(meshes(task.config, processors, task.device.node, task.length, batch))
    )
    if not candidates:
        raise ValueError(f"plan: `batch`={batch} cannot be dealt out to `gpus`={processors}: no mesh divides it")
    ways = (False, True) if checkpointing is None else (checkpointing,)
    found = []
    for mesh in candidates:
        each = [estimate(task, mesh, batch or mesh.batches, way) for way in ways]
        fitting = [one for one in each if one.fits] or each[-1:]
        found.append(max(fitting, key=lambda one: one.tokens_per_second))
    return sorted(found, key=lambda one: (not one.fits, -one.tokens_per_second if one.fits else one.memory.total))


def _remedies(
    task: Task, processors: int, batch: int | None, given: Mesh | None, checkpointing: bool | None
) -> tuple[str, ...]:
    """The smallest changes after which it fits, each by itself; sizes are halved or doubled."""
    found = []

    def fits(task: Task, processors: int, batch: int | None, mesh: Mesh | None, way: bool | None) -> bool:
        try:
            return _ranked(task, processors, batch, mesh, way)[0].fits
        except ValueError:
            return False

    if checkpointing is False and fits(task, processors, batch, given, None):
        found.append("activation checkpointing of every layer")
    if given is not None and fits(task, processors, batch, None, checkpointing):
        found.append(f"another mesh: {_ranked(task, processors, batch, None, checkpointing)[0].mesh}")
    if batch is not None:
        smaller = _first(lambda n: fits(task, processors, n, given, checkpointing), batch // 2, lambda n: n // 2)
        found += [] if smaller is None else [f"a batch of {smaller} sequences"]
    if given is None:
        more = _first(
            lambda n: n <= MOST_PROCESSORS and fits(task, n, batch, None, checkpointing),
            2 * processors,
            lambda n: 2 * n if n < MOST_PROCESSORS else 0,
        )
        found += [] if more is None else [f"{more:,} processors"]
    shorter = _first(
        lambda n: fits(dataclasses.replace(task, length=n), processors, batch, given, checkpointing),
        task.length // 2,
        lambda n: n // 2,
    )
    found += [] if shorter is None else [f"sequences of {shorter:,} tokens"]
    return tuple(found)


def _first(holds: Callable[[int], bool], number: int, following: Callable[[int], int]) -> int | None:
    while number:
        if holds(number):
            return number
        number = following(number)
    return None
