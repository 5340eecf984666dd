"""Backward passes that can be differentiated and batched, and that autocast does not reach.

A kernel's backward pass has no derivative of its own, and no rule for a batch of gradients. Where autograd records it
(``create_graph=True``), where incoming gradients carry tangents, and under ``vmap`` (``is_grads_batched``, vectorised
Jacobians), the gradients are computed from readable PyTorch instead, so that derivatives and batches are PyTorch's own.
PyTorch's ``once_differentiable`` does not do as a refusal: ``torch.autograd.grad(inputs=...)`` passes over the error
that it puts into the graph and returns the other paths' part of the derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ssmkernels.core.autocast import autocasts
from ssmkernels.core.plain import ZERO, filled, why_not_plain

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]
# ctx → a function in PyTorch's operators that gives the same results, and the arguments of the call. It may leave out
# results at the end that have no gradient.
Again = Callable[[Any], tuple[Callable[..., Any], Sequence[Any]]]


def twice_differentiable(again: Again) -> Callable[[Backward], Backward]:
    """Decorates ``backward(ctx, *gradients)`` of an autograd function or of ``register_autograd``.

    Args:
        again: takes ctx; returns a differentiable function and all arguments of the forward pass, tensors that are
            connected to autograd's graph as they were saved.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def either(ctx: Any, *gradients: Tensor | None) -> Gradients:
            run = backward
            if not torch.compiler.is_compiling():
                gradients, plain = _memory(gradients)
                if torch.is_grad_enabled() or not plain:
                    run = functools.partial(_differentiable, again)
            kind = next((g.device.type for g in gradients if g is not None), "cpu")
            if not autocasts(kind):
                return run(ctx, *gradients)
            with torch.autocast(kind, enabled=False):  # the forward pass ran without it too
                return run(ctx, *gradients)

        return either

    return decorate


def say_way_out(result: Tensor, function: str) -> Tensor:
    """``result`` of one of PyTorch's fused functions, with a better error where its second derivative is asked for.

    PyTorch's own names an internal operator that has no derivative. A first derivative with ``create_graph=True`` is
    still there.

    Args:
        result: what the function returned just now.
        function: its name, with the op it was called for.
    """
    node = None if torch.compiler.is_compiling() else result.grad_fn
    if node is not None and node.name().startswith(_FUSED):
        node.register_hook(functools.partial(_guard, function))
    return result


_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by `is_grads_batched`, which is no torch.func.vmap

_FUSED = "ScaledDotProduct"  # begins the names of autograd's nodes of PyTorch's fused attention


def _guard(function: str, gradients: Gradients, _: Gradients) -> Gradients | None:
    if not torch.is_grad_enabled():  # nobody wants a second derivative
        return None
    return tuple(g if g is None else _NoSecond.apply(g, function) for g in gradients)


class _NoSecond(torch.autograd.Function):
    """A gradient that has no derivative, between autograd's record of how it was computed and its users."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, function: str) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.function = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f'{ctx.function} has no second derivative; inside ssmkernels.use("reference") there is one')


def _memory(gradients: Gradients) -> tuple[Gradients, bool]:
    """The gradients, with memory under those zeros that autograd makes without, and whether kernels may read them."""
    if any(isinstance(g, (FakeTensor, FunctionalTensor)) for g in gradients):
        return gradients, True  # PyTorch records the backward pass, whose operators know shapes
    given = dict(enumerate(gradients))
    reason = why_not_plain(given)
    if reason == ZERO:
        return _memory(tuple(filled(given).values()))
    for g in gradients:
        if g is not None and _is_batched(g):
            return gradients, False
    return gradients, not reason


def _differentiable(again: Again, ctx: Any, *gradients: Tensor | None) -> Gradients:
    """The gradients of all arguments, with a graph where one is wanted; None for those that need none."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        return _found(again, ctx, gradients, create_graph)


def _found(again: Again, ctx: Any, gradients: Gradients, create_graph: bool) -> Gradients:
    function, arguments = again(ctx)
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    arguments = list(arguments)
    for i in wanted:
        # One argument may be computed from another, whose gradient here must not include that path
        arguments[i] = arguments[i].view_as(arguments[i])
    results = function(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(r, g) for r, g in zip(results, gradients, strict=False) if g is not None and r.requires_grad]
    found: Gradients = (None,) * len(wanted)
    if pairs:
        outputs, incoming = zip(*pairs, strict=True)
        inputs = [arguments[i] for i in wanted]
        found = torch.autograd.grad(outputs, inputs, incoming, create_graph=create_graph, allow_unused=True)
    by_place = dict(zip(wanted, found, strict=True))
    return tuple(by_place.get(i) for i in range(len(ctx.needs_input_grad)))
