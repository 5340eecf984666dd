"""The processes of a training run, as ``torchrun`` or another launcher has started them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ssmzoo.train.config import TrainConfig

Result = TypeVar("Result")


def process() -> int:
    """Which process of its job this is."""
    return dist.get_rank() if _begun() else int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if _begun() else int(os.environ.get("WORLD_SIZE", "1"))


def first_here() -> bool:
    """Whether this is the first of the job's processes on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def restarted() -> bool:
    """Whether ``torchrun --max-restarts`` has started the job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart() -> bool:
    """Whether it would."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def is_spread(config: TrainConfig) -> bool:
    """Whether a run is spread over a mesh.

    Raises:
        ValueError: its mesh has another size than the job; names both.
    """
    parallel = config.parallel
    if parallel is None:
        return False
    if parallel.processes != processes():
        sizes = " · ".join(f"{name}={size}" for name, size in parallel.sizes.items())
        raise ValueError(
            f"training setting `parallel` must have as many processes as the job: {sizes} is {parallel.processes}, and "
            f"the job has {processes()}; start it with `torchrun --nproc-per-node {parallel.processes} -m ssmzoo train "
            f"...`, or change a size"
        )
    return parallel.processes > 1


def together(call: Callable[[], Result]) -> Result:
    """What a call gives, in each of the processes, which all have to make it.

    Raises:
        Exception: what it raised here; or, where it raised in another process alone, a ValueError that says the same.
    """
    error: Exception | None = None
    try:
        found = call()
    except (OSError, ValueError) as raised:
        error = raised
    if _begun() and dist.get_world_size() > 1:
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, None if error is None else str(error))
        elsewhere = next((text for text in told if text is not None), None)
        if error is None and elsewhere is not None:
            raise ValueError(elsewhere)
    if error is not None:
        raise error
    return found


def _begun() -> bool:
    return dist.is_available() and dist.is_initialized()
