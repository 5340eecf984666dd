"""Ways to call an op that are not a plain call, each compared with the reference: other tensors, transforms, copies."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import os
import pickle
import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmkernels.check.spec import Spec, tensors_of
from ssmkernels.check.wrapper import Wrapper, floating, unwrap
from ssmkernels.core.dispatch import KERNELS
from ssmkernels.core.names import OPS

Arguments = dict[str, Any]
Results = list[Tensor]


class Refused(Exception):
    """A way that an op does not go, and says so; the message is why."""


class Layer(nn.Module):
    """A module that calls an op: its floating-point tensors are parameters, the others buffers."""

    def __init__(self, function: Callable[..., Any], arguments: Arguments):
        super().__init__()
        tensors = {n: a for n, a in arguments.items() if isinstance(a, Tensor)}
        for name, a in tensors.items():
            if a.is_floating_point() or a.is_complex():
                self.register_parameter(name, nn.Parameter(a))
            else:
                self.register_buffer(name, a)
        self.names = list(tensors)
        self.call = functools.partial(function, **{n: a for n, a in arguments.items() if n not in tensors})

    def forward(self) -> Any:
        return self.call(**{name: getattr(self, name) for name in self.names})


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """The same numbers to rounding in float64, where inputs are."""
    return all(torch.allclose(x, y) for x, y in zip(found, expected, strict=True))


class Calls:
    """The ways to call one op, each a method that returns whether it was right or raises ``Refused``.

    Right is what the reference gives in a plain call: outputs, and states that the op writes.
    """

    def __init__(self, op: str, spec: Spec):
        self.op, self.spec = op, spec
        self.function = spec.function()
        self.arguments = spec.inputs(spec.case({}), torch.float64, "cpu", 0)
        self.written = [n for n in spec.mutates if n in self.arguments]
        self.inputs = [n for n, a in self.arguments.items() if floating(a) and n not in self.written]
        self.expected = self.results(self.fresh(), implementation="reference")

    def fresh(self, **replaced: Any) -> Arguments:
        """Arguments that may be written, some of them replaced."""
        return {n: a.clone() if isinstance(a, Tensor) else a for n, a in self.arguments.items()} | replaced

    def mapped(self, function: Callable[[Tensor], Any]) -> Arguments:
        return {n: function(a) if isinstance(a, Tensor) else a for n, a in self.fresh().items()}

    def results(self, arguments: Arguments, **options: Any) -> Results:
        outputs = tensors_of(self.function(**arguments, **options))
        return [*outputs, *(arguments[name] for name in self.written)]

    def output(self, *inputs: Tensor, by: str | None = None) -> Tensor:
        """The first output as a function of the floating-point arguments, or of the first of them."""
        return self.results(self.fresh(**dict(zip(self.inputs, inputs, strict=False))), implementation=by)[0]

    def values(self) -> tuple[Tensor, ...]:
        return tuple(self.arguments[name] for name in self.inputs)

    def reference(self, arguments: Arguments) -> Results:
        return self.results(arguments, implementation="reference")

    # Tensors

    def fake(self) -> bool:
        """Shapes and dtypes, of tensors without values."""
        mode = FakeTensorMode()
        arguments = self.mapped(mode.from_tensor)
        with mode:
            found = self.results(arguments)
        return self._alike(found) and all(type(x).__name__ == "FakeTensor" for x in found)

    def meta(self) -> bool:
        found = self.results(self.mapped(lambda a: a.to("meta")))
        return self._alike(found) and all(x.is_meta for x in found)

    def _alike(self, found: Results) -> bool:
        return [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in self.expected]

    def wrapped(self) -> bool:
        """In a subclass that handles PyTorch's operators itself."""
        if any(isinstance(a, Tensor) and a.is_complex() for a in self.arguments.values()):
            return True  # PyTorch puts conjugates off in a way that this wrapper does not know
        found = self.results(self.mapped(lambda a: Wrapper(a) if floating(a) else a))
        return same(map(unwrap, found), self.expected)

    def zero(self) -> bool:
        """Zeros that autograd makes without memory."""
        name = self.inputs[0]
        shape, dtype = self.arguments[name].shape, self.arguments[name].dtype
        found = self.results(self.fresh(**{name: torch._efficientzerotensor(shape, dtype=dtype)}))
        return same(found, self.reference(self.fresh(**{name: torch.zeros(shape, dtype=dtype)})))

    def forced(self) -> bool:
        """A kernel that is forced upon tensors without memory refuses, and says what to do."""
        for name in KERNELS & set(OPS[self.op].names):
            if OPS[self.op].why_not(name):
                continue
            try:
                self.results(self.mapped(lambda a: Wrapper(a) if floating(a) else a), implementation=name)
                return False
            except ValueError as error:
                if 'use("reference")' not in str(error):
                    return False
        return True

    def dtensor(self) -> bool:
        """Split along the batch, in a group of one process."""
        from torch import distributed
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        mesh, rows = init_device_mesh("cpu", (1,)), self._rows()
        made = self.mapped(lambda a: a)
        for name, a in made.items():
            if isinstance(a, Tensor):
                made[name] = distribute_tensor(a, mesh, [Shard(0) if name in rows else Replicate()])
        return same([x.full_tensor() for x in self.results(made)], self.expected)  # type: ignore[attr-defined]

    def _rows(self) -> list[str]:
        """Arguments whose first axis is the batch."""
        least = OPS[self.op].batched
        return [n for n, a in self.arguments.items() if n in least and isinstance(a, Tensor) and a.ndim >= least[n]]

    # Transforms

    def _slopes(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Directions of all inputs, the output's change along them by a difference quotient, weights of the output."""
        draw, h = torch.Generator().manual_seed(0), 1e-6
        along = tuple(torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in self.values())
        ahead, behind = (
            self.output(*(x + sign * h * v for x, v in zip(self.values(), along, strict=True)), by="reference")
            for sign in (1, -1)
        )
        weights = torch.randn(ahead.shape, generator=draw, dtype=ahead.dtype)
        return along, (ahead - behind) / (2 * h), weights

    def jvp(self) -> bool:
        """Forward-mode derivatives along all inputs, by ``torch.func`` and by dual tensors."""
        along, expected, _ = self._slopes()
        tangents = [torch.func.jvp(self.output, self.values(), along)[1]]
        with torch.autograd.forward_ad.dual_level():
            dual = (
                torch.autograd.forward_ad.make_dual(x.clone(), v) for x, v in zip(self.values(), along, strict=True)
            )
            tangents.append(torch.autograd.forward_ad.unpack_dual(self.output(*dual)).tangent)
        return all(torch.allclose(t, expected, rtol=1e-4, atol=1e-6) for t in tangents)

    def grad(self) -> bool:
        """``torch.func.grad``."""
        along, expected, w = self._slopes()
        every = tuple(range(len(self.inputs)))
        found = self._unless_states(
            lambda: torch.func.grad(lambda *x: (self.output(*x) * w).sum(), every)(*self.values())
        )
        total = torch.stack([(g * v).sum() for g, v in zip(found, along, strict=True)]).sum()
        return torch.allclose(total, (expected * w).sum(), rtol=1e-4, atol=1e-6)

    def double_backward(self) -> bool:
        """Of all inputs, against difference quotients of the first derivatives."""
        leaves = tuple(x.clone().requires_grad_() for x in self.values())
        return self._unless_states(lambda: torch.autograd.gradgradcheck(self.output, leaves, fast_mode=True))

    def gradients(self) -> bool:
        """Backward passes of a batch of gradients, and of zeros without memory."""
        leaves = [x.clone().requires_grad_() for x in self.values()]
        y = self.output(*leaves)
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
            gradients = [torch.autograd.grad((f(arguments)[0] * w).sum(), x)[0] for f in (compiled, self.reference)]
            return same(found, self.expected) and torch.allclose(gradients[0], gradients[1])
        return same(found, self.expected)

    def export(self) -> bool:
        """For any batch, where there is one, as a program that is then given another."""
        call = self.results

        class Program(nn.Module):
            def forward(_, tensors: Arguments) -> Results:
                return call(self.fresh(**tensors))

        rows = self._rows()
        tensors = {n: a for n, a in self.fresh().items() if isinstance(a, Tensor)}
        sizes = {n: {0: torch.export.Dim.DYNAMIC} if n in rows else None for n in tensors}
        program = torch.export.export(Program(), (tensors,), dynamic_shapes=(sizes,)).module()
        other = {n: torch.cat([a, a / 2 if floating(a) else a]) if n in rows else a for n, a in self.fresh().items()}
        given = {n: other[n].clone() for n in tensors}
        return same(program(given), self.reference(other))

    # Surroundings

    def autocast(self) -> bool:
        """An op chooses the precision of its sums itself: the same bits, in float32 that autocast would round."""
        arguments = self.spec.inputs(self.spec.case({}), torch.float32, "cpu", 0)
        plain = self.results(copy.deepcopy(arguments))
        with torch.autocast("cpu", torch.bfloat16):
            found = self.results(copy.deepcopy(arguments))
        near = all(
            torch.allclose(x.double(), y, rtol=1e-4, atol=1e-4) for x, y in zip(plain, self.expected, strict=True)
        )
        return near and all(map(torch.equal, found, plain))

    def inference_mode(self) -> bool:
        """With tensors made inside and outside of it."""
        made = self.fresh()
        with torch.inference_mode():
            return same(self.results(self.fresh()), self.expected) and same(self.results(made), self.expected)

    def deepcopy(self) -> bool:
        """Of a module that has called the op."""
        return self._copied(copy.deepcopy)

    def pickle(self) -> bool:
        """Of a module that has called the op."""
        return self._copied(lambda layer: pickle.loads(pickle.dumps(layer)))

    def _copied(self, copied: Callable[[Layer], Layer]) -> bool:
        with torch.no_grad():
            layer = Layer(self.function, self.fresh())
            before = copied(layer)  # as a call may write states
            layer()
            copied(layer)
            found = [*tensors_of(before()), *(getattr(before, name) for name in self.written)]
        return same(found, self.expected)

    def fork(self) -> bool:
        """In a process that is forked off after the threads of this one have worked.

        It takes one thread, as the workers of PyTorch's DataLoader do: PyTorch's own threads do not survive a fork.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            self.results(self.fresh())
            child = os.fork()
            if child == 0:
                signal.alarm(30)  # ends it, should the call hang
                right = False
                try:
                    torch.set_num_threads(1)
                    right = same(self.results(self.fresh()), self.expected)
                finally:
                    os._exit(0 if right else 1)
            return os.waitpid(child, 0)[1] == 0
        finally:
            torch.set_num_threads(threads)

    def threads(self) -> bool:
        """In four threads at the same time."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return all(pool.map(lambda _: same(self.results(self.fresh()), self.expected), range(40)))
