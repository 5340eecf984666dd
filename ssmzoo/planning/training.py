"""A training step on this rank, over data, shards or cut sequences: what plans are compared with and measured by."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ssmzoo import parallel
from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel
from ssmzoo.planning.mesh import Mesh
from ssmzoo.planning.pieces import batch_of, loss_of


class Training:
    """A model, its optimiser and a batch: one sequence for each part that sequences are dealt out to.

    Args:
        config: of the model.
        mesh: of as many ranks as the group has, with one dimension.
        group: the ranks.
        length: tokens of a sequence, before it is cut.
        dtype: of the weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        group: dist.ProcessGroup,
        length: int,
        dtype: torch.dtype = torch.float32,
    ):
        torch.manual_seed(0)
        self.mesh, self.model = mesh, SequenceModel(config).to(dtype)
        self.called = wrapped(self.model, mesh, group)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        inputs, targets = batch_of(config, 1, length, dtype)
        part = group.rank() % mesh.context
        self.inputs = inputs.tensor_split(mesh.context, dim=1)[part]
        self.targets = targets.tensor_split(mesh.context, dim=1)[part] if targets.ndim > 1 else targets

    def step(self) -> None:
        loss_of(self.called(self.inputs), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> float:
        """Bytes of weights, moments and DDP's buckets on this rank."""
        states = (x for state in self.optimizer.state.values() for x in state.values())
        tensors = [*self.model.parameters(), *(x for x in states if isinstance(x, Tensor))]
        buckets = sum(p.nbytes for p in self.model.parameters()) * (self.mesh.data > 1)
        return float(sum(_here(x).nbytes for x in tensors) + buckets)


def wrapped(model: SequenceModel, mesh: Mesh, group: dist.ProcessGroup) -> nn.Module:
    """What trains the model over the ranks of the mesh."""
    if mesh.data > 1:
        return nn.parallel.DistributedDataParallel(model, process_group=group)
    if mesh.context > 1:
        return parallel.context(model, group, reduce_gradients=True)
    if mesh.shard > 1:
        from torch.distributed.fsdp import fully_shard

        over: DeviceMesh = init_device_mesh("cpu", (mesh.shard,))
        # FSDP gathers weights of one dtype; the few that stay float32 in a model of bfloat16 are whole on all ranks
        narrow = {p for p in model.parameters() if p.dtype != torch.float32}
        wide = {p for p in model.parameters() if p.dtype == torch.float32} if narrow else set()
        options: dict[str, Any] = {"ignored_params": wide} if wide else {}
        for block in model.blocks:
            fully_shard(block, mesh=over, **options)
        fully_shard(model, mesh=over, **options)
    return model


def _here(x: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return x.to_local() if isinstance(x, DTensor) else x
