"""Ways to call an op that are not a plain call, each compared with the reference: other tensors, transforms, copies."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmkernels.check.plain_call import Arguments, Refused, Results, same
from ssmkernels.check.spec import tensors_of
from ssmkernels.check.transforms import Transforms
from ssmkernels.check.wrapper import Wrapper, floating, unwrap
from ssmkernels.core.dispatch import KERNELS
from ssmkernels.core.names import OPS

__all__ = ["Calls", "Refused"]


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


class Calls(Transforms):
    """The ways to call one op, each a method that returns whether it was right or raises ``Refused``.

    Right is what the reference gives in a plain call: outputs, and states that the op writes.
    """

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
        mesh, rows = init_device_mesh("cpu", (1,)), self.rows()
        made = self.mapped(lambda a: a)
        for name, a in made.items():
            if isinstance(a, Tensor):
                made[name] = distribute_tensor(a, mesh, [Shard(0) if name in rows else Replicate()])
        return same([x.full_tensor() for x in self.results(made)], self.expected)  # type: ignore[attr-defined]

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
