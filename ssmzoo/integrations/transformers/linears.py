"""The linear maps of accelerated families, by the fastest product that there is for their size.

Such a map is a plain ``nn.Linear`` that any model may share, so its class has one forward for everybody, which looks
whether a layer or model of an accelerated family is running. Outside of those it is PyTorch's own product. A step of
training goes back and forth between products and PyTorch's operations, whose threads spin on for a while on the cores:
where there may be gradients, a native product takes these threads. What is taken back is only what was put there:
:func:`restore_forward`.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.native.products import among_others, linear
from ssmzoo.integrations.transformers.layers import Function
from ssmzoo.linear import counts_as_own

_running: ContextVar[bool] = ContextVar("running", default=False)
_own = nn.Linear.forward


def within(original: Function) -> Function:
    """A layer or model: its linear maps are ours while it runs."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _running.get():
            return original(self, *args, **kwargs)
        token = _running.set(True)
        try:
            return original(self, *args, **kwargs)
        finally:
            _running.reset(token)

    return forward


def owners_of(module: ModuleType) -> list[str]:
    """The layers and models of a modeling module: what is checkpointed as a whole, and what is called from outside."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import PreTrainedModel

    kinds = (GradientCheckpointingLayer, PreTrainedModel)
    return [
        name
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, kinds) and "forward" in vars(kind)
        if kind.__module__ == module.__name__
    ]


@functools.wraps(_own)
def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and _running.get():
        return (among_others if torch.is_grad_enabled() else linear)(input, self.weight, self.bias)
    return F.linear(input, self.weight, self.bias)


def replace_forward() -> None:
    """Maps ask from now on who is running, unless somebody else has put a forward there."""
    if nn.Linear.forward is _own:
        nn.Linear.forward = _forward  # type: ignore[method-assign]
        counts_as_own(nn.Linear, _forward)


def restore_forward() -> None:
    """Undoes :func:`replace_forward`; a forward that was put over it since stays, and finds nobody running."""
    if nn.Linear.forward is _forward:
        nn.Linear.forward = _own  # type: ignore[method-assign]


def put_over_maps() -> str:
    """Whose forward PyTorch's linear maps have, if it is neither PyTorch's nor ours; else empty."""
    found = nn.Linear.forward
    return "" if found in (_own, _forward) else f"{whose(found)} is there"


def whose(function: Any) -> str:
    """The name of a function, or of the class of something else that is called, with its module."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
