"""A model, of which this process keeps its share of every layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ssmzoo.checkpoints.divided import Layout
from ssmzoo.model import SequenceModel
from ssmzoo.parallel.tensor.plans import plan_of
from ssmzoo.parallel.tensor.share import Share
from ssmzoo.parallel.tensor.sums import Enter


def divide(model: SequenceModel, mesh: DeviceMesh | dist.ProcessGroup) -> dict[str, Layout]:
    """Leaves in a model what this process computes of each layer; its calls give the whole model's outputs.

    Every process of the group has to make each call, on the same inputs, and the backward pass of each. Gradients of
    weights that are divided are this process's own. Of rows that every process has (:meth:`Layout.common`) they are
    a part of their sum, which is to be added up. All other gradients are whole.

    Args:
        model: whole, and the same on every process.
        mesh: one dimension of a DeviceMesh, or a process group.

    Returns:
        How each divided weight lies in the whole one, by its name.

    Raises:
        ValueError: a mixer or MLP that has no plan, by name; or heads and channels that do not divide evenly.
    """
    group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
    share, layers = Share(group), list[nn.Module]()
    for block in model.blocks:
        if block.feed is not None:
            raise ValueError("`parallel.tensor` must be 1 for a model with `feeds`, whose shared blocks have no plan")
        layers += [layer for layer in (block.mixer, block.mlp) if layer is not None and layer not in layers]
    plans = [plan_of(layer) for layer in layers]
    for layer, plan in zip(layers, plans, strict=True):
        plan(share, layer)
        layer.register_forward_pre_hook(_Entering(group))
    places = {
        id(module._parameters[name]): f"{path}.{name}"
        for path, module in reversed(list(model.named_modules()))
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    return {places[id(owner._parameters[name])]: layout for (owner, name), layout in share.layouts.items()}


class _Entering:
    """Before a layer: the gradient of its input is the sum over the processes that share it."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        return (Enter.apply(x, self.group) if torch.is_grad_enabled() else x, *args[1:])
