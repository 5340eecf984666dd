"""An op under PyTorch's transforms: derivatives, batches, compilers and recorders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.check.plain_call import Arguments, PlainCall, Refused, Results, joined, same
from ssmkernels.check.wrapper import floating


class Transforms(PlainCall):
    """Each method returns whether a transform of the call was right, or raises ``Refused``."""

    def _slopes(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Directions of all inputs, the output's change along them by a difference quotient, weights of the output."""
        draw, h = torch.Generator().manual_seed(0), 1e-6
        along = tuple(torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in self.values())
        ahead, behind = (
            self.all_outputs(*(x + sign * h * v for x, v in zip(self.values(), along, strict=True)), by="reference")
            for sign in (1, -1)
        )
        weights = torch.randn(ahead.shape, generator=draw, dtype=ahead.dtype)
        return along, (ahead - behind) / (2 * h), weights

    def jvp(self) -> bool:
        """Forward-mode derivatives along all inputs, by ``torch.func`` and by dual tensors."""
        along, expected, _ = self._slopes()
        tangents = [torch.func.jvp(self.all_outputs, self.values(), along)[1]]
        with torch.autograd.forward_ad.dual_level():
            dual = (
                torch.autograd.forward_ad.make_dual(x.clone(), v) for x, v in zip(self.values(), along, strict=True)
            )
            tangents.append(torch.autograd.forward_ad.unpack_dual(self.all_outputs(*dual)).tangent)
        return all(torch.allclose(t, expected, rtol=1e-4, atol=1e-6) for t in tangents)

    def grad(self) -> bool:
        """``torch.func.grad``."""
        along, expected, w = self._slopes()
        every = tuple(range(len(self.inputs)))
        found = self._unless_states(
            lambda: torch.func.grad(lambda *x: (self.all_outputs(*x) * w).sum(), every)(*self.values())
        )
        total = torch.stack([(g * v).sum() for g, v in zip(found, along, strict=True)]).sum()
        return torch.allclose(total, (expected * w).sum(), rtol=1e-4, atol=1e-6)

    def double_backward(self) -> bool:
        """Of all inputs, against difference quotients of the first derivatives."""
        leaves = tuple(x.clone().requires_grad_() for x in self.values())
        return self._unless_states(lambda: torch.autograd.gradgradcheck(self.all_outputs, leaves, fast_mode=True))

    def gradients(self) -> bool:
        """Backward passes of a batch of gradients, and of zeros without memory."""
        leaves = [x.clone().requires_grad_() for x in self.values()]
        y = self.all_outputs(*leaves)
        if not self.spec.differentiable:
            raise Refused("it has no gradient")
        draw = torch.Generator().manual_seed(0)
        several = torch.randn(2, *y.shape, generator=draw, dtype=y.dtype)
        options: dict[str, Any] = {"retain_graph": True}
        together = torch.autograd.grad(y, leaves, several, is_grads_batched=True, **options)
        one_by_one = zip(*(torch.autograd.grad(y, leaves, g, **options) for g in several), strict=True)
        nothing = torch.autograd.grad(y, leaves, torch._efficientzerotensor(y.shape, dtype=y.dtype), **options)
        return same(together, map(torch.stack, one_by_one)) and not any(g.any() for g in nothing)

    def _unless_states(self, call: Callable[[], Any]) -> Any:
        """PyTorch itself refuses gradients through states that are overwritten before its backward pass reads them."""
        try:
            return call()
        except RuntimeError as error:
            if self.written and "modified by an inplace operation" in str(error):
                raise Refused("a step overwrites the state that gradients need") from None
            raise

    def vmap(self) -> bool:
        """Over a batch of every floating-point argument, states too: no batch can be written into a single state."""
        names = [*self.inputs, *self.written]
        rows = [torch.stack([self.arguments[name], self.arguments[name] * 0.9]) for name in names]

        def call(*given: Tensor, by: str | None = None) -> Tensor:
            return self.results(self.fresh(**dict(zip(names, given, strict=True))), implementation=by)[0]

        one_by_one = zip(*rows, strict=True)
        expected = torch.stack([call(*(x.clone() for x in row), by="reference") for row in one_by_one])
        return torch.allclose(torch.func.vmap(call)(*(x.clone() for x in rows)), expected)

    def traced(self) -> bool:
        """By ``torch.jit.trace``, run on other values."""
        x = self.values()[0]
        program = torch.jit.trace(self.output, x, check_trace=False)
        return torch.allclose(program(x / 2), self.reference(self.fresh(**{self.inputs[0]: x / 2}))[0])

    def compile(self) -> bool:
        """As one graph, gradients included where the op has them."""
        torch._dynamo.reset()
        compiled = torch.compile(self.results, fullgraph=True, backend="aot_eager")
        found = compiled(self.fresh())
        if self.spec.differentiable:
            (_, _, w), x = self._slopes(), self.values()[0].clone().requires_grad_()
            arguments = self.fresh(**{self.inputs[0]: x})
            gradients = [
                torch.autograd.grad((joined(f(arguments)) * w).sum(), x)[0] for f in (compiled, self.reference)
            ]
            return same(found, self.expected) and torch.allclose(gradients[0], gradients[1])
        return same(found, self.expected)

    def export(self) -> bool:
        """For any batch, where there is one, as a program that is then given another."""
        call = self.results

        class Program(nn.Module):
            def forward(_, tensors: Arguments) -> Results:
                return call(self.fresh(**tensors))

        rows = self.rows()
        tensors = {n: a for n, a in self.fresh().items() if isinstance(a, Tensor)}
        sizes = {n: {0: torch.export.Dim.DYNAMIC} if n in rows else None for n in tensors}
        program = torch.export.export(Program(), (tensors,), dynamic_shapes=(sizes,)).module()
        other = {n: torch.cat([a, a / 2 if floating(a) else a]) if n in rows else a for n, a in self.fresh().items()}
        given = {n: other[n].clone() for n in tensors}
        return same(program(given), self.reference(other))
