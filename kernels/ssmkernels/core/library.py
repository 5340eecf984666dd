"""Plain functions as nodes that ``torch.compile`` does not look into."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.plain import recorded

NAMESPACE = "ssmkernels"

# Inside an operator PyTorch switches autograd off below the reach of `enable_grad`; its backward needs it once more. In
# compiled code it also passes over what takes the conjugates that `conj` has put off, which would then be wrong.
# Inference mode at import would leave autograd out of these sets for ever.
with torch.inference_mode(False):
    _INCLUDED, _EXCLUDED = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def define(name: str, function: Callable[..., Any], fake: Callable[..., Any], schema: str | None = None) -> Any:
    """Registers the operator ``ssmkernels::name``, which changes none of its arguments, and returns it.

    ``torch.library.custom_op`` would import PyTorch's compiler at the operator's first call, which takes seconds, and
    look for shared memory at each one; ``opcheck`` looks for it in the tests.

    Args:
        function: what it runs.
        fake: takes the same arguments, returns empty outputs of the right shapes, dtypes and device.
        schema: in the notation of ``torch.library``, ``"(Tensor x, int n) -> Tensor"``; from the function's annotations
            if None.
    """
    schema = schema or torch.library.infer_schema(function, mutates_args=())
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "CompositeExplicitAutograd", _undisturbed(function))  # on every device
    torch.library.register_fake(qualified, fake)
    return registered(name)


def registered(name: str) -> Any:
    """The operator ``ssmkernels::name`` as PyTorch has it."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _undisturbed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, into which Dynamo does not look. Dynamo cannot before something has imported it."""
    disabled: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return call


def opaque(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], schema: str | None = None
) -> Callable[..., Any]:
    """The same function, as the single node ``ssmkernels::name`` where it is traced or given tensors without values.

    Eager calls go straight to ``function``, with PyTorch's own autograd. Under a compiler its loops over time would be
    unrolled and its reads of ``cu_seqlens`` would break the graph; there it is one operator of ``torch.library``, and
    its backward runs it again under autograd.

    Args:
        function: takes tensors, None, bools, numbers and strings, returns a tensor or a tuple of tensors.
        fake: takes the same arguments, returns empty contiguous outputs of the right shapes, dtypes and device.
        schema: of the operator; from the function's annotations if None.
    """
    schema = schema or torch.library.infer_schema(function, mutates_args=())
    several = schema.rsplit("->", 1)[1].strip().startswith("(")
    arguments = schema.rsplit("->", 1)[0].strip()[1:-1]

    def forward(*args: Any) -> Any:
        with torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED), torch.no_grad():
            outputs = function(*args)
        fresh = _unaliased([o.contiguous() for o in (outputs if several else (outputs,))], args)
        return fresh if several else fresh[0]

    def backward(*args: Any) -> list[Tensor]:
        *args, grads, wanted = args  # type: ignore[assignment]
        with torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED), torch.enable_grad():
            leaves = [
                a.detach().requires_grad_(i in wanted) if isinstance(a, Tensor) else a for i, a in enumerate(args)
            ]
            outputs = function(*leaves)
            pairs = [
                (o, g)
                for o, g in zip(outputs if several else (outputs,), grads, strict=True)
                if g is not None and o.requires_grad
            ]
            inputs = [leaves[i] for i in wanted]
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if pairs:
                found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        gradients = [torch.zeros_like(i) if g is None else g.contiguous() for g, i in zip(found, inputs, strict=True)]
        return list(_unaliased(gradients, [*args, *grads]))

    def backward_fake(*args: Any) -> list[Tensor]:
        return [torch.empty_like(args[i], memory_format=torch.contiguous_format) for i in args[-1]]

    backward_schema = f"({arguments}, Tensor?[] grads, int[] wanted) -> Tensor[]"
    backward_operator = define(f"{name}_backward", backward, backward_fake, backward_schema)
    operator = define(name, forward, fake, schema)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [isinstance(a, Tensor) for a in inputs]
        ctx.constants = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if is_tensor else c for is_tensor, c in zip(ctx.tensors, ctx.constants, strict=True)]
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad) if needs]
        found = iter(backward_operator(*args, list(grads), wanted))
        return tuple(next(found) if i in wanted else None for i in range(len(args)))

    torch.library.register_autograd(operator, autograd, setup_context=setup_context)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if recorded() or any(isinstance(a, Tensor) and a.is_meta for a in args):
            return operator(*args)
        return function(*args)

    call.operator = operator  # type: ignore[attr-defined]
    return call


def wants_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _unaliased(outputs: Sequence[Tensor], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """An operator's outputs may share no memory with its inputs, nor with each other, nor put off a conjugate."""
    taken = {a.untyped_storage().data_ptr() for a in inputs if isinstance(a, Tensor)}
    fresh = []
    for o in (o.resolve_conj().resolve_neg() for o in outputs):
        fresh.append(o.clone() if o.untyped_storage().data_ptr() in taken else o)
        taken.add(o.untyped_storage().data_ptr())
    return tuple(fresh)
