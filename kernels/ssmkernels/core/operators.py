"""Implementations as operators of ``torch.library``, made from an op's declaration.

Kernels read memory, unseen by PyTorch. Their module has

- ``forward(a, save)``: the op's results, and after them what only the backward pass needs, empty unless ``save``;
- ``backward(a, saved, grads)``, where there is one: gradients by the arguments' names. ``saved`` has the results that
  ``SAVES`` names, ``grads`` the gradients of the op's results, None where nobody has one but zeros for the first, and
  ``wanted``, the names of the arguments whose gradients are used;
- ``empty(a, save)``: what ``forward`` returns, empty, where it is more than the op's results;
- ``checked(a)``: the arguments for ``forward`` in compiled code, where nobody has looked at the values of tensors yet;
  raises what the public function raises where it can look at them;
- ``SAVES``: names of results that the backward pass needs, of the op's or after them; ``DROPS``: names of arguments
  that it does not; ``restore(a, saved)``: the arguments again from what is saved.

Eager calls go straight to ``forward`` and ``backward``, with gradients as one node of autograd's; all others, and
those that a mode or a class of tensors watches, through the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.declaration import Declaration, named_tuple
from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.library import NAMESPACE, define, opaque, registered
from ssmkernels.core.plain import unwatched
from ssmkernels.core.validate import check_borders, copied


def composed(
    declared: Declaration,
    name: str,
    compute: Callable[[Any], Any],
    traceable: Callable[[Any], bool],
) -> Callable[[Any], Any]:
    """An implementation in PyTorch's own operators, as one node where it is recorded unless the call is traceable."""
    several = ", ".join(["Tensor"] * len(declared.results))
    schema = f"({declared.schema}) -> {f'({several})' if len(declared.results) > 1 else several}"

    def function(*args: Any) -> Any:
        return compute(declared.Arguments(*args))

    def fake(*args: Any) -> Any:
        outputs = declared.outputs(declared.Arguments(*args))
        return outputs if len(outputs) > 1 else outputs[0]

    call = opaque(f"{declared.name}_{name}", function, fake, schema)

    def run(a: Any) -> Any:
        return compute(a) if traceable(a) else call(*a)

    run.operator = call.operator  # type: ignore[attr-defined]
    return run


def kernel(declared: Declaration, name: str, module: Any, reference: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An implementation that reads memory.

    Args:
        module: see the head of this file.
        reference: the op in PyTorch's operators, for derivatives of the backward pass.
    """
    Arguments = declared.Arguments
    forward = module.forward
    results = list(declared.results)
    saves = tuple(getattr(module, "SAVES", ()))
    names = [*results, *(extra for extra in saves if extra not in results)]
    empty = getattr(module, "empty", None) or (lambda a, save: declared.outputs(a))
    checked = getattr(module, "checked", functools.partial(_with_borders, declared))
    pick = (lambda outputs: outputs[0]) if len(results) == 1 else (lambda outputs: tuple(outputs[: len(results)]))

    def several(outputs: Any) -> Any:
        return outputs if len(names) == 1 else tuple(outputs)

    def raw(*args: Any) -> Any:
        return several(forward(checked(Arguments(*args[:-1])), args[-1]))

    def fake(*args: Any) -> Any:
        made = empty(Arguments(*args[:-1]), args[-1])
        return made[0] if len(names) == 1 else tuple(made)

    returns = "Tensor" if len(names) == 1 else f"({', '.join(['Tensor'] * len(names))})"
    schema = f"({declared.schema}, bool save) -> {returns}"
    if declared.mutates:
        qualified = f"{NAMESPACE}::{declared.name}_{name}"
        operator: Any = torch.library.custom_op(qualified, raw, mutates_args=declared.mutates, schema=schema)
        operator.register_fake(fake)
    else:
        operator = define(f"{declared.name}_{name}", raw, fake, schema)
    node: Any = None
    if hasattr(module, "backward"):
        autograd, setup_context = _differentiable(declared, name, module, operator, names, saves, empty, reference)
        node = _node(f"{NAMESPACE}::{declared.name}_{name}", Arguments, forward, several, autograd, setup_context)

    leader = Arguments._fields.index(declared.leader)

    def run(a: Any) -> Any:
        graph = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in a)
        away = torch.compiler.is_compiling() or a[leader].is_meta  # without memory that a kernel could read
        if away or (graph and (node is None or not unwatched(a))):
            outputs = operator(*a, graph)
        else:
            outputs = node.apply(*a) if graph else forward(a, False)
        return outputs if len(names) == 1 else pick(outputs)

    run.operator = registered(f"{declared.name}_{name}")  # type: ignore[attr-defined]
    return run


def _node(
    name: str,
    Arguments: Any,
    forward: Callable[[Any, bool], Any],
    several: Callable[[Any], Any],
    autograd: Callable[..., Any],
    setup_context: Callable[..., None],
) -> Any:
    """An autograd function for eager calls, which does what the operator does: PyTorch's way from an operator to its
    Python code and gradients, and to the operator of its backward pass, takes longer than the work of a short call."""

    def run(ctx: Any, *args: Any) -> Any:
        outputs = several(forward(Arguments(*args), True))
        setup_context(ctx, args, outputs)
        return outputs

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(autograd)})


def _with_borders(declared: Declaration, a: Any) -> Any:
    """The arguments with borders of packed sequences that rise: in compiled code nobody has read them yet."""
    borders = getattr(a, "cu_seqlens", None)
    if borders is None:
        return a
    a = a._replace(cu_seqlens=copied(borders))
    check_borders(declared.name, a.cu_seqlens, getattr(a, declared.leader).shape[1])
    return a


def _differentiable(
    declared: Declaration,
    name: str,
    module: Any,
    operator: Any,
    names: list[str],
    saves: tuple[str, ...],
    empty: Callable[..., Any],
    reference: Callable[[Any], Any],
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Registers the backward pass, an operator too, with the operator; returns what autograd calls for it."""
    Arguments, count = declared.Arguments, len(declared.takes)
    Saved = named_tuple("Saved", saves)
    Grads = named_tuple("Grads", [*declared.results, "wanted"])
    drops = [Arguments._fields.index(drop) for drop in getattr(module, "DROPS", ())]
    restore = getattr(module, "restore", lambda a, saved: a)
    places = [names.index(save) for save in saves]
    others = [f"Tensor? saved_{s}" for s in saves] + [f"Tensor? grad_{r}" for r in declared.results]

    def backward(*args: Any) -> list[Tensor]:
        a, *rest, wanted = Arguments(*args[:count]), *args[count:]
        asked = [Arguments._fields[i] for i in wanted]
        saved, grads = Saved(*rest[: len(saves)]), Grads(*rest[len(saves) :], asked)
        found = module.backward(a, saved, grads)
        gradients = [found[name] for name in asked]
        return [g if a[i] is None else g.to(a[i].dtype) for g, i in zip(gradients, wanted, strict=True)]

    def backward_fake(*args: Any) -> list[Tensor]:
        a = restore(Arguments(*args[:count]), Saved(*args[count : count + len(saves)]))
        return [torch.empty_like(a[i], memory_format=torch.contiguous_format) for i in args[-1]]

    schema = f"({', '.join([declared.schema, *others])}, int[] wanted) -> Tensor[]"
    backward_operator = define(f"{declared.name}_{name}_backward", backward, backward_fake, schema)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if len(names) == 1 else output
        ctx.set_materialize_grads(False)  # zeros in place of gradients that nobody has, as large as what is saved
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs[:count]]
        tensors = [x if isinstance(x, Tensor) and i not in drops else None for i, x in enumerate(inputs[:count])]
        ctx.contiguous = [outputs[i].is_contiguous() for i in places]
        ctx.save_for_backward(*tensors, *(outputs[i] for i in places))

    def arguments(ctx: Any) -> tuple[Any, Any]:
        kept = ctx.saved_tensors
        values = [c if x is None else x for x, c in zip(kept, ctx.constants, strict=False)]
        # Hooks may bring what was saved back with other strides, and kernels read it as they wrote it
        saved = (x.contiguous() if as_was else x for x, as_was in zip(kept[count:], ctx.contiguous, strict=True))
        return Arguments(*values), Saved(*saved)

    def again(ctx: Any) -> tuple[Callable[..., Any], list[Any]]:
        a, saved = arguments(ctx)
        return lambda *args: reference(Arguments(*args[:count])), [*restore(a, saved), True]

    @twice_differentiable(again)
    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        a, saved = arguments(ctx)
        first, *others = grads[: len(declared.results)]
        if first is None:
            first = empty(restore(a, saved), False)[0].zero_()
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        given = (*a, *saved, first, *others)
        found = iter((backward if unwatched(given) else backward_operator)(*given, wanted))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

    torch.library.register_autograd(operator, autograd, setup_context=setup_context)
    return autograd, setup_context
