"""Calls with distributed tensors (DTensor): each process computes its own sequences, where an op is local to them.

An op says with ``batched`` which of its arguments have the batch as their first axis. These may be split along it, all
in the same way, or whole in every process; all other arguments must be whole. Any other placement is refused, as the
results of the processes would have to be put together. Kernels see the local tensors, which are plain.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# With these, tokens of several sequences lie in one axis or in shared pages
MIXED = ("cu_seqlens", "cu_seqlens_k", "block_table")


def is_distributed(arguments: Mapping[str, Any]) -> bool:
    """Whether an argument is a DTensor; where nobody has imported their module there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(a, module.DTensor) for a in arguments.values())


def call_on_shards(op: str, batched: Mapping[str, int], arguments: Mapping[str, Any], run: Callable[..., Any]) -> Any:
    """Runs the op on the local tensors and returns its results as DTensors.

    Args:
        op: the op's name, for messages.
        batched: arguments whose first axis is the batch → the least number of axes with which it is.
        arguments: the op's arguments by name; at least one is a DTensor.
        run: takes the same arguments, as one mapping, with local tensors.

    Raises:
        ValueError: an argument is placed so that the op is not local to each process, or is no DTensor; by name.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
    rows = {name for name, a in tensors.items() if a.ndim >= batched.get(name, math.inf)}
    distributed: dict[str, Any] = {name: a for name, a in tensors.items() if isinstance(a, DTensor)}
    leader = next((name for name in distributed if name in rows), next(iter(distributed)))
    mesh = distributed[leader].device_mesh
    whole = (Replicate(),) * mesh.ndim
    placements = distributed[leader].placements if leader in rows else whole
    for name, a in tensors.items():
        if why := _why_not(name, a, leader, mesh, placements if name in rows else whole, name in rows):
            raise ValueError(f"{op}: with distributed tensors, {why}; `redistribute` it, or call on `to_local()`")

    # Of what all processes share, each finds its own sequences' part of the gradient
    parts = tuple(p if p.is_replicate() else Partial() for p in placements)
    local = {
        name: distributed[name].to_local(grad_placements=placements if name in rows else parts) for name in distributed
    }

    def wrap(result: Any) -> Any:
        if not isinstance(result, Tensor) or result.ndim == 0:
            return result
        rows_of_all = result.shape[0]
        if leader in rows:
            if rows_of_all != local[leader].shape[0]:
                return result  # a place that the call leaves empty
            rows_of_all = tensors[leader].shape[0]
        shape = torch.Size((rows_of_all, *result.shape[1:]))
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(result.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)

    results = run({**arguments, **local})
    return tuple(map(wrap, results)) if isinstance(results, tuple) else wrap(results)


def _why_not(name: str, a: Any, leader: str, mesh: Any, placements: tuple[Any, ...], row: bool) -> str:
    """Why an argument keeps the op from being local to each process; empty where it does not.

    Args:
        leader: the argument that the others must be placed like.
        placements: those of the leader, or whole where the argument does not belong to single sequences (``row``).
    """
    from torch.distributed.tensor import DTensor

    if name in MIXED:
        return f"`{name}` must be None, as sequences that share an axis or pages cannot be split; got a tensor"
    if not isinstance(a, DTensor):
        if row or a.is_floating_point() or a.is_complex():
            return f"`{name}` must be a DTensor, as `{leader}` is; got a {type(a).__name__}"
        return ""  # integers of a mask or of quantised weights, which every process holds
    if a.device_mesh != mesh:
        return f"`{name}` must be on the mesh of `{leader}`, {mesh}; got {a.device_mesh}"
    if name == leader and row and not all(p.is_replicate() or p.is_shard(0) for p in placements):
        return f"`{name}` must be whole or split along its batch, Shard(0); got {placements}"
    if a.placements != placements:
        wanted = f"as `{leader}` is, {placements}" if row else f"whole, {placements}"
        return f"`{name}` must be placed {wanted}; got {a.placements}"
    return ""
