"""The share of a layer that a process computes, out of the weights of all of it."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ssmzoo.checkpoints.divided import Layout
from ssmzoo.parallel.tensor.sums import SummedLinear


class Share:
    """Takes away from a layer what other processes compute of it.

    Attributes:
        group: the processes that share the layer.
        layouts: of the weights that are divided, by the modules and names that hold them.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.ranks = group, group.rank(), group.size()
        self.layouts: dict[tuple[nn.Module, str], Layout] = {}

    def of(self, what: str, size: int) -> int:
        """This process's part of so many heads or channels.

        Raises:
            ValueError: they cannot be shared out evenly; says what they are.
        """
        if size % self.ranks:
            raise ValueError(f"`parallel.tensor` must divide the {size} {what}; got {self.ranks}")
        return size // self.ranks

    def weight(self, owner: nn.Module, name: str, *sections: tuple[int, bool], dim: int = 0) -> None:
        """Divides a parameter along a dimension, where there is one."""
        whole = owner._parameters.get(name)
        if whole is None:
            return
        layout = Layout(dim, sections or ((whole.shape[dim], True),))
        layout.check(f"{type(owner).__name__}.{name}", self.ranks)
        piece = layout.piece(whole.detach(), self.rank, self.ranks).clone()
        owner._parameters[name] = nn.Parameter(piece, whole.requires_grad)
        self.layouts[owner, name] = layout

    def common(self, owner: nn.Module | None) -> None:
        """Says that every process has all weights of a module, and uses them for its own part alone."""
        if owner is None:
            return
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                self.layouts[owner, name] = Layout(0, ((parameter.shape[0], False),))

    def outputs(self, module: nn.Module | None, *sections: tuple[int, bool]) -> None:
        """Divides a linear map or depthwise convolution by its outputs."""
        if module is None:
            return
        self.weight(module, "weight", *sections)
        self.weight(module, "bias", *sections)
        size = module.get_parameter("weight").shape[0]
        if isinstance(module, nn.Conv1d):
            module.in_channels = module.out_channels = module.groups = size
        elif isinstance(module, nn.Linear):
            module.out_features = size

    def inputs(self, owner: nn.Module, name: str, *sections: tuple[int, bool], own: bool = False) -> None:
        """Divides a linear map by its inputs; ``own`` as in :class:`SummedLinear`."""
        whole = owner.get_submodule(name)
        assert isinstance(whole, nn.Linear)
        self.weight(whole, "weight", *sections, dim=1)
        whole.in_features = whole.weight.shape[1]
        summed = SummedLinear(whole, self.group, own)
        setattr(owner, name, summed)
        self.layouts[summed, "weight"] = self.layouts.pop((whole, "weight"))
        if own and summed.bias is not None:
            raise ValueError(f"`parallel.tensor` must be 1 with a bias on {name} of {type(owner).__name__}")
