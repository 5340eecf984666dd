"""Settings of a training run that are groups of their own: ``parallel.data=2``, ``log.tensorboard=true``."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ssmkernels.core.names import unknown
from ssmzoo.options import convert


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes. The product of the first four is the number of processes.

    Attributes:
        data: copies of the model, each of which learns from sequences of its own.
        shard: processes that cut weights, gradients and the optimiser's state among them, and learn from sequences of
            their own (FSDP).
        context: processes that cut each sequence among them: see :mod:`ssmzoo.parallel`. Weights are cut over them too.
        tensor: processes that share out the heads and channels of each layer.
        how: with ``context``, the way of attention over the cuts, as :func:`ssmzoo.parallel.context` takes it; if None,
            that which sends less, for each call.
        offload: weights, gradients and the optimiser's state stay in the CPU's memory between their uses on a GPU.
        asynchronous: training goes on while a checkpoint is written.
        narrow: with ``shard`` or ``context``, weights of linear maps travel in bfloat16, in which ``precision=bf16``
            computes with them; gradients travel in float32.
    """

    data: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    how: Literal["window", "heads", "ring", "balanced"] | None = None
    offload: bool = False
    asynchronous: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        _check(self, "parallel")
        for name, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"training setting `parallel.{name}` must be at least 1; got {size}")

    @property
    def sizes(self) -> dict[str, int]:
        """The dimensions of the mesh by name, the outermost first."""
        return {"data": self.data, "shard": self.shard, "context": self.context, "tensor": self.tensor}

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return math.prod(self.sizes.values())


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where a run's numbers go, beside ``log.csv`` and the terminal.

    Attributes:
        tensorboard: to TensorBoard's files, in the run's folder ``tensorboard``.
        wandb: to Weights & Biases, in the project ``ssmzoo``.
        utilisation: also memory, and the share of this machine's measured matrix products that the model's FLOPs are.
    """

    tensorboard: bool = False
    wandb: bool = False
    utilisation: bool = False

    def __post_init__(self) -> None:
        _check(self, "log")


GROUPS: dict[str, type] = {"parallel": ParallelConfig, "log": LogConfig}


def group_of(name: str, given: Any) -> Any:
    """A group of settings from a mapping, or itself; None stays None.

    Raises:
        ValueError, TypeError: an unknown setting, with what exists and the nearest, or a bad value.
    """
    kind = GROUPS[name]
    if given is None or isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(
            f"training setting `{name}` must be a mapping, such as {name}.{_names(kind)[0]}=…; got {given!r}"
        )
    for key in given:
        if key not in _names(kind):
            raise ValueError(unknown(f"training setting of `{name}`", str(key), _names(kind)))
    return kind(**given)


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Training settings from several mappings; the later one wins, in a group for the settings that it names."""
    found: dict[str, Any] = {}
    for mapping in settings:
        for key, value in mapping.items():
            before: Any = found.get(key)
            if key in GROUPS and dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = dataclasses.asdict(value)
            both = isinstance(before, Mapping) and isinstance(value, Mapping)
            found[key] = {**before, **value} if key in GROUPS and both else value
    return found


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _check(config: Any, group: str) -> None:
    hints = typing.get_type_hints(type(config))
    for name in _names(type(config)):
        value = convert(f"training setting `{group}.{name}`", getattr(config, name), hints[name])
        object.__setattr__(config, name, value)
