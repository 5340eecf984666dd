"""A model's weights on one process of a mesh: which there are, what of each is here, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ssmzoo.checkpoints.divided import Layout
from ssmzoo.checkpoints.weights import stored_weights
from ssmzoo.linear import Linear
from ssmzoo.mlp.moe import MoE
from ssmzoo.model import SequenceModel
from ssmzoo.parallel import divide
from ssmzoo.train.mesh.engine import Engine, local


class MeshWeights:
    """A model whose weights are divided by tensor parallelism, and cut by FSDP.

    Attributes:
        layouts: how weights are divided, by their names.
        cut: whether FSDP cuts them. Otherwise each process has all of its division, for DDP.
    """

    def __init__(self, model: SequenceModel, engine: Engine):
        self.model, self.engine = model, engine
        parallel = engine.parallel
        self.layouts: dict[str, Layout] = {}
        if parallel.tensor > 1:
            self.layouts = divide(model, engine.mesh["tensor"])
        self.cut = engine.copies > parallel.data or parallel.tensor > 1
        if self.cut:
            _shard(model, engine)
        else:
            model.to(engine.device)
        self.rank = engine.mesh["tensor"].get_local_rank()
        engine.norm = self.gradient_norm

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers that are stored, each once, by one of their names."""
        for names, tensor in stored_weights(self.model):
            yield names[0], tensor

    def piece(self, name: str) -> int | None:
        """Which piece of a divided weight is here; None if the weight is whole."""
        return self.rank if name in self.layouts else None

    @torch.no_grad()
    def put(self, name: str, into: Tensor, whole: Tensor) -> None:
        """Copies what belongs here of a whole tensor, a weight or something of its shape, into what is here."""
        layout = self.layouts.get(name)
        piece = whole if layout is None else layout.piece(whole, self.rank, self.engine.parallel.tensor)
        if piece.shape != into.shape:
            raise ValueError(f"`{name}` must have shape {tuple(into.shape)}; the checkpoint has {tuple(piece.shape)}")
        start, stop = _rows(into)
        local(into).copy_(piece[start:stop] if isinstance(into, DTensor) else piece)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Of all weights' gradients together, each number once. Before that, adds up what processes that share a layer
        have of weights that each of them has whole."""
        engine = self.engine
        parameters = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        self._add_common(parameters)
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for name, parameter in parameters:
            assert parameter.grad is not None
            squares = _squares(local(parameter.grad))
            everywhere = squares.sum()  # of numbers that all processes of tensor parallelism have
            if name in self.layouts:
                everywhere = sum((squares[part].sum() for part in self._common(name, parameter)), squares.new_zeros(()))
                total += squares.sum() - everywhere
            total += everywhere / engine.parallel.tensor
        if self.cut:
            dist.all_reduce(total, group=engine.weights_mesh["weights"].get_group())
            dist.all_reduce(total, group=engine.mesh["tensor"].get_group())
        return total.sqrt()

    def _add_common(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        """Adds up gradients of rows that every process of tensor parallelism has, and uses for its own part."""
        parts = [
            local(parameter.grad)[part]
            for name, parameter in parameters
            if name in self.layouts and parameter.grad is not None
            for part in self._common(name, parameter)
        ]
        if parts and self.engine.parallel.tensor > 1:
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat, group=self.engine.mesh["tensor"].get_group())
            for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))

    def _common(self, name: str, parameter: Tensor) -> Iterator[slice]:
        """The rows of a divided weight that every process has, as they are numbered in what is here of it."""
        start, stop = _rows(parameter)
        for part in self.layouts[name].common(self.engine.parallel.tensor):
            first, last = max(part.start, start), min(part.stop, stop)
            if first < last:
                yield slice(first - start, last - start)


def _squares(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).to(torch.float64).square()


def _rows(x: Tensor) -> tuple[int, int]:
    """The rows of a tensor that are here."""
    if not isinstance(x, DTensor):
        return 0, x.shape[0] if x.ndim else 1
    mesh = x.device_mesh
    rank, ranks = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    step = -(-x.shape[0] // ranks)
    return min(rank * step, x.shape[0]), min((rank + 1) * step, x.shape[0])


def _maps(block: nn.Module) -> list[nn.Module]:
    """The linear maps that a call of a block runs; which experts it runs depends on tokens."""
    experts = {inner for module in block.modules() if isinstance(module, MoE) for inner in module.modules()}
    return [module for module in block.modules() if type(module) in (Linear, nn.Linear) and module not in experts]


def _shard(model: SequenceModel, engine: Engine) -> None:
    """Cuts each block's weights, and those of the rest. Blocks that share a weight belong to the rest."""
    mesh = engine.weights_mesh["data", "weights"]
    pinned = engine.device.type != "cpu"  # on CPUs, which have nothing to move, the same code runs
    policy = CPUOffloadPolicy(pin_memory=pinned) if engine.parallel.offload else OffloadPolicy()
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    owners: dict[int, int] = {}
    for block in model.blocks:
        for key in {id(parameter) for parameter in block.parameters()}:
            owners[key] = owners.get(key, 0) + 1
    for block in model.blocks:
        if all(owners[id(parameter)] == 1 for parameter in block.parameters()):
            if engine.parallel.narrow and (maps := _maps(block)):
                fully_shard(maps, mesh=mesh, offload_policy=policy, mp_policy=narrow)
            fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
