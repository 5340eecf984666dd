"""Calls of native kernels that are checked once and made again and again on the same memory, several in one go.

For models that decode: a token's call of a small layer takes as long in Python as in the kernel.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.dispatch import looked_at
from ssmkernels.core.forcing import unforced
from ssmkernels.core.names import OPS
from ssmkernels.core.plain import why_not_plain
from ssmkernels.core.validate import HALF


class Prepared(NamedTuple):
    """A kernel's call: its name, the values of its arguments by name, and the op's result, which it writes.

    ``kept`` are tensors whose addresses are among the values; ``scratch`` is the memory that the kernel uses meanwhile,
    of which only the size matters. ``output`` names the argument that is the result's address.
    """

    kernel: str
    values: Mapping[str, float]
    kept: tuple[Tensor | None, ...]
    result: Tensor
    scratch: Tensor | None = None
    output: str = "y"

    def run(self) -> Tensor:
        native.run(self.kernel, self.values)
        return self.result

    def into(self, result: Tensor) -> Prepared:
        """The call with its result in memory of the caller's."""
        return self._replace(values={**self.values, self.output: result.data_ptr()}, result=result)


def update(prepared: Callable[[Any], Prepared], a: Any, states: Sequence[str]) -> Tensor:
    """Makes the call of an op that updates states, by their names; one that is not contiguous is copied and back."""
    own = {name: getattr(a, name).contiguous() for name in states}
    y = prepared(a._replace(**own)).run()
    for name, used in own.items():
        if used is not getattr(a, name):
            getattr(a, name).copy_(used)
    return y


def undisturbed() -> bool:
    """Whether native kernels may run without anybody asking: no gradients, transforms, modes, compilers or autocast,
    and no implementation that somebody forces.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not why_not_plain({})
        and unforced()
    )


def prepare(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Prepared | None:
    """An op's call, checked but not made.

    Returns:
        None where another implementation than the native one would run it, or one that has to copy an argument.

    Raises:
        TypeError, ValueError: what the op itself would raise.
    """
    return prepare_with(Tensor.float, op, *args, **kwargs)


def prepare_with(
    widened: Callable[[Tensor], Tensor], op: Callable[..., Any], *args: Any, **kwargs: Any
) -> Prepared | None:
    """The same, where ``widened`` gives parameters in half precision as float32, which some kernels read alone."""
    found = looked_at(op, *args, **kwargs)
    if found.explanation.chosen != "cpu":
        return None
    prepared = OPS[found.explanation.op].implementation("cpu").prepared
    if prepared is None:
        return None
    a = found.arguments
    call: Prepared = prepared(a)
    copied = {name: x for name, x in a._asdict().items() if _copied(call, x)}
    if not copied:
        return call
    if not all(name in a.declared.wide and x.dtype in HALF for name, x in copied.items()):
        return None
    wide = {name: widened(x) for name, x in copied.items()}
    call = prepared(a._replace(**wide))
    return None if any(_copied(call, x) for x in wide.values()) else call


def _copied(call: Prepared, x: Any) -> bool:
    return isinstance(x, Tensor) and all(t is None or t.data_ptr() != x.data_ptr() for t in call.kept)


_NOTHING = torch.empty(0)


class Program:
    """Kernels one after another, in one call of the library; all use the same scratch memory.

    Args:
        calls: the kernels' calls. What they read and write stays alive, but for the states.
        states: memory that :meth:`move` may replace. Whoever runs the program keeps it alive.
    """

    def __init__(self, calls: Sequence[Prepared], states: Sequence[Tensor] = ()):
        scratches = [call.scratch for call in calls if call.scratch is not None]
        self.scratch = max(scratches, key=lambda x: x.nbytes, default=None)
        handle, self.count = native.library().handle, len(calls)
        assert handle is not None  # or no call could have been prepared
        kernels = [native.kernel(call.kernel) for call in calls]
        packed: list[ctypes.Array[ctypes.c_char]] = []
        for call, (_, _, ordered, pack) in zip(calls, kernels, strict=True):
            shared = {} if call.scratch is None or self.scratch is None else {"scratch": self.scratch.data_ptr()}
            packed.append(ctypes.create_string_buffer(pack(*ordered({**call.values, **shared}))))
        self._functions = (ctypes.c_void_p * self.count)(
            *(ctypes.cast(kernel.function, ctypes.c_void_p).value for kernel in kernels)  # type: ignore[arg-type]
        )
        self._arguments = (ctypes.c_void_p * self.count)(*map(ctypes.addressof, packed))
        self._packed = packed  # kept alive, too
        self._places = self._places_of(calls, states)
        own = {t.untyped_storage().data_ptr() for t in states}
        used = [t for call in calls for t in (*call.kept, call.result) if t is not None]
        self._kept = [t for t in used if t.untyped_storage().data_ptr() not in own]
        self._calls = [call._replace(kept=(), result=_NOTHING, scratch=None) for call in calls]
        self._run = handle.ssmzoo_program
        self._run.argtypes, self._run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], ctypes.c_int

    def result_at(self, number: int) -> ctypes.c_int64:
        """Where the address of a call's result stands: whoever sets it gets the result elsewhere from then on."""
        return self.place_of(number, self._calls[number].output)

    def place_of(self, number: int, name: str) -> ctypes.c_int64:
        """Where a call's argument stands, an address or a whole number."""
        place = native.kernel(self._calls[number].kernel).fields.index(name)
        return ctypes.c_int64.from_buffer(self._packed[number], ctypes.sizeof(ctypes.c_int64) * place)

    def _places_of(
        self, calls: Sequence[Prepared], states: Sequence[Tensor]
    ) -> list[tuple[ctypes.c_int64, int, int]] | None:
        """Where addresses in states stand among the arguments: the place, which state, and how far from its start.

        None where a call has one that is not that of a tensor which it names: nobody knows what else it made of it.
        """
        held = sorted((t.data_ptr(), _span(t), i) for i, t in enumerate(states) if t.numel())
        starts = [start for start, _, _ in held]
        places, met = [], set()
        for call, packed in zip(calls, self._packed, strict=True):
            named = {t.data_ptr() for t in (*call.kept, call.result) if t is not None}
            for number, name in enumerate(native.kernel(call.kernel).fields):
                value = call.values[name]
                at = bisect.bisect_right(starts, value) - 1
                if name == "scratch" or type(value) is not int or at < 0 or value >= starts[at] + held[at][1]:
                    continue
                if value not in named:
                    return None
                place = ctypes.c_int64.from_buffer(packed, ctypes.sizeof(ctypes.c_int64) * number)
                places.append((place, held[at][2], value - starts[at]))
                met.add(held[at][2])
        return places if len(met) == len(held) == len({*starts}) else None

    def move(self, states: Sequence[Tensor]) -> bool:
        """Makes the calls work on other states of the same shapes, strides and dtypes; whether that is possible."""
        if self._places is None:
            return False
        addresses = [t.data_ptr() for t in states]
        for place, state, offset in self._places:
            place.value = addresses[state] + offset
        return True

    def run(self) -> None:
        """Runs all of them.

        Raises:
            MemoryError: a kernel found none for its scratch memory.
        """
        if self._run(self._functions, self._arguments, self.count):
            raise MemoryError("no memory left for a kernel's own use")


def _span(x: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return (sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()
