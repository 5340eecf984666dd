"""The devices and the precision of a run, by accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssmzoo.train.config import TrainConfig
from ssmzoo.train.job import is_spread

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_of(config: TrainConfig) -> Any:
    """What runs the steps, on the devices and in the precision of a run: accelerate, or a mesh of processes.

    Raises:
        ValueError: the processes are started in a way that training does not know, or are not as many as the mesh has.
    """
    if is_spread(config):
        from ssmzoo.train.mesh import Engine

        return Engine(config)
    return _accelerator(config)


def _accelerator(config: TrainConfig) -> Accelerator:
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
