"""Calls every op with tensors that are not plain memory, and under PyTorch's transforms; run by test_plain.py.

In a process of its own, as a native kernel that is given such a tensor would end it. Each line that it prints is a call
that was neither right nor refused.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from ssmkernels import OPS
from ssmkernels.dispatch import KERNELS
from ssmkernels.spec import specs, tensors_of

warnings.simplefilter("ignore")


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as quantised and distributed ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(unwrap, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, function(*args, **kwargs))


def unwrap(x):
    return x.inner if isinstance(x, Wrapper) else x


def floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def differentiable(arguments):
    """The floating-point arguments that a call does not write to."""
    floats = [n for n, a in arguments.items() if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return [n for n in floats if n not in written(arguments)]


def written(arguments):
    """The states that a step updates in place."""
    return [n for n in ("state", "conv_state", "ssm_state") if n in arguments]


class Calls:
    """The ways to call one op, each compared with a plain call."""

    def __init__(self, op, spec):
        self.op, self.spec = op, spec
        self.arguments = spec.inputs(spec.case({}), torch.float64, "cpu", 0)
        self.expected = self.plain(self.fresh())

    def fresh(self):
        return {n: a.clone() if isinstance(a, torch.Tensor) else a for n, a in self.arguments.items()}

    def plain(self, arguments, **options):
        return tensors_of(self.spec.function()(**arguments, **options))

    def fake(self):
        with FakeTensorMode() as mode:
            made = {n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in self.arguments.items()}
            return [x.shape for x in self.plain(made)] == [x.shape for x in self.expected]

    def meta(self):
        made = {n: a.to("meta") if isinstance(a, torch.Tensor) else a for n, a in self.arguments.items()}
        return [x.shape for x in self.plain(made)] == [x.shape for x in self.expected]

    def wrapped(self):
        made = {n: Wrapper(a) if floating(a) else a for n, a in self.fresh().items()}
        if any(isinstance(a, torch.Tensor) and a.is_complex() for a in made.values()):
            return True  # PyTorch puts conjugates off in a way that this wrapper does not know
        found = self.plain(made)
        return all(torch.allclose(unwrap(x), y) for x, y in zip(found, self.expected, strict=True))

    def zero(self):
        name = differentiable(self.arguments)[0]
        shape, dtype = self.arguments[name].shape, self.arguments[name].dtype
        found = self.plain(self.fresh() | {name: torch._efficientzerotensor(shape, dtype=dtype)})
        expected = self.plain(self.fresh() | {name: torch.zeros(shape, dtype=dtype)})
        return all(torch.allclose(x, y) for x, y in zip(found, expected, strict=True))

    def of(self, name):
        """The first output as a function of one argument."""
        return lambda x: self.plain(self.fresh() | {name: x})[0]

    def slope(self):
        """A direction, the first output's change along it by a difference quotient, and a weight of that output."""
        name = differentiable(self.arguments)[0]
        x, f, h = self.arguments[name], self.of(name), 1e-6
        torch.manual_seed(0)
        v, w = torch.randn_like(x), torch.randn_like(self.expected[0])
        return name, v, (f(x + h * v) - f(x - h * v)) / (2 * h), w

    def jvp(self):
        name, v, expected, _ = self.slope()
        x = self.arguments[name]
        found = torch.func.jvp(self.of(name), (x,), (v,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = self.of(name)(torch.autograd.forward_ad.make_dual(x.clone(), v))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        return all(torch.allclose(t, expected, atol=1e-6) for t in (found, tangent))

    def grad(self):
        if self.op == "mamba_step":
            return self.refused_for_its_states()
        name, v, expected, w = self.slope()
        found = torch.func.grad(lambda x: (self.of(name)(x) * w).sum())(self.arguments[name])
        return torch.allclose((found * v).sum(), (expected * w).sum(), atol=1e-6)

    def refused_for_its_states(self):
        """PyTorch itself refuses a gradient through states that are overwritten before its backward pass reads them."""
        name = differentiable(self.arguments)[0]
        try:
            torch.func.grad(lambda x: self.of(name)(x).sum())(self.arguments[name])
        except RuntimeError as error:
            return "inplace operation" in str(error)
        return False

    def vmap(self):
        """A batch of one argument, and of the states, as no batch can be written into a single state."""
        names = [differentiable(self.arguments)[0], *written(self.arguments)]
        rows = [torch.stack([self.arguments[name], self.arguments[name] / 2]) for name in names]

        def call(*given):
            return self.plain(self.fresh() | dict(zip(names, given, strict=True)))[0]

        expected = torch.stack([call(*(x.clone() for x in given)) for given in zip(*rows, strict=True)])
        return torch.allclose(torch.func.vmap(call)(*(x.clone() for x in rows)), expected)

    def traced(self):
        name = differentiable(self.arguments)[0]
        x = self.arguments[name]
        return torch.allclose(torch.jit.trace(self.of(name), x, check_trace=False)(x / 2), self.of(name)(x / 2))

    def forced(self):
        """A kernel that is forced refuses, and says what to do."""
        for name in KERNELS & set(OPS[self.op].names):
            if OPS[self.op].why_not(name):
                continue
            made = {n: Wrapper(a) if floating(a) else a for n, a in self.fresh().items()}
            try:
                self.plain(made, implementation=name)
                return False
            except ValueError as error:
                if 'use("reference")' not in str(error):
                    return False
        return True


WAYS = ("fake", "meta", "wrapped", "zero", "jvp", "grad", "vmap", "traced", "forced")


def main():
    torch.set_num_threads(1)
    for op, spec in specs().items():
        calls = Calls(op, spec)
        for way in WAYS:
            sys.stderr.write(f"{op} {way}\n")  # the last line names a call that ends the process
            try:
                if not getattr(calls, way)():
                    print(f"{op} {way}: another result")
            except Exception as error:
                print(f"{op} {way}: {type(error).__name__}: {str(error)[:300]}")


if __name__ == "__main__":
    main()
