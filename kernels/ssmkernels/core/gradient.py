"""Functions whose gradient is written by hand, inside of an implementation that otherwise has PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable


def with_gradient(
    forward: Callable[[Any], Any],
    backward: Callable[[Any, Any, set[str]], dict[str, Any]],
    again: Callable[[Any], Any],
) -> Callable[[Any], Any]:
    """``forward`` as one node of autograd's graph, whose gradients ``backward`` computes.

    Args:
        forward: takes a named tuple of tensors, None and constants; returns a tensor or a tuple of tensors.
        backward: takes the same named tuple, the gradient of the result, or a tuple of those of its parts, and the
            names of the fields whose gradients are wanted; returns these by name.
        again: gives the same result as ``forward``, in PyTorch's operators; for derivatives of ``backward``.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, kind: Any, *values: Any) -> Any:
            ctx.kind = kind
            ctx.constants = [None if isinstance(x, Tensor) else x for x in values]
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values))
            return forward(kind(*values))

        @staticmethod
        @twice_differentiable(lambda ctx: (lambda kind, *values: again(kind(*values)), (ctx.kind, *_arguments(ctx))))
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            a, gradient = _arguments(ctx), gradients if len(gradients) > 1 else gradients[0]
            needed = dict(zip(a._fields, ctx.needs_input_grad[1:], strict=True))
            found = backward(a, gradient, {name for name, wanted in needed.items() if wanted})
            return None, *(found[name] if wanted else None for name, wanted in needed.items())

    return lambda a: Node.apply(type(a), *a)


def _arguments(ctx: Any) -> Any:
    return ctx.kind(*(c if x is None else x for x, c in zip(ctx.saved_tensors, ctx.constants, strict=True)))
