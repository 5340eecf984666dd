"""What a piece of a model does, counted while it runs on tensors without memory: operations, bytes, memory in use."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections import Counter as Multiset
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ssmkernels.check.spec import specs
from ssmkernels.core.names import OPS

Piece = Callable[[int], tuple[Callable[[], Tensor], list[Tensor]]]

FORWARD, BACKWARD = "forward", "backward"
ENDS = "ends"  # where sequences are cut: what a part leaves in a state, and what it asks of the one before it
MATRIX, MEMORY = "matrix products", "elementwise"

# Of an op's backward pass, in those of its forward pass: two for each product, and the forward pass once more where
# states are computed again, as in every kernel of a recurrence and in attention's (arXiv 2307.08691, section 3.1).
BACKWARD_FLOPS = 2.5


class Work(NamedTuple):
    """One operator: its kind, a :data:`MATRIX` product, :data:`MEMORY` traffic or an op of ssmkernels by name."""

    phase: str
    kind: str
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a piece of a model does in a step; memory in bytes, on top of its weights and of what it is given.

    Attributes:
        work: every operator → how often it runs.
        kept: alive after the forward pass: what the backward pass needs, and the output.
        forward_peak: the most that is alive at once in the forward pass.
        backward_peak: likewise in the backward pass, with the gradients that come in, go out and stay.
        loss_peak: of the backward pass until :func:`note_loss` was called; its peak where nobody has.
        sizes: op → the sizes of its largest call, by the letters of its declaration.
    """

    work: dict[Work, float] = dataclasses.field(default_factory=dict)
    kept: float = 0.0
    forward_peak: float = 0.0
    backward_peak: float = 0.0
    loss_peak: float = 0.0
    sizes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def combined(self, other: Counts, own: float, theirs: float) -> Counts:
        """``own`` of these and ``theirs`` of the other."""
        work: Multiset[Work] = Multiset()
        for counts, times in ((self, own), (other, theirs)):
            for item, number in counts.work.items():
                work[item] += number * times  # type: ignore[assignment]
        peaks = {
            name: own * getattr(self, name) + theirs * getattr(other, name)
            for name in ("kept", "forward_peak", "backward_peak", "loss_peak")
        }
        return Counts(dict(work), **peaks, sizes={**self.sizes, **other.sizes})

    def flops(self, phase: str | None = None) -> float:
        """Floating-point operations, of one phase or of both."""
        return sum(item.flops * number for item, number in self.work.items() if phase in (None, item.phase))


class Tally(TorchDispatchMode):
    """Counts operators, and the bytes of tensors that are made within and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = FORWARD
        self.work: Multiset[Work] = Multiset()
        self.sizes: dict[str, dict[str, Any]] = {}
        self.alive = self.peak = 0
        self.loss_peak: int | None = None
        self._seen: dict[int, weakref.ref[Any]] = {}

    @property
    def calls(self) -> int:
        return sum(self.work.values())

    def mark(self) -> int:
        """The bytes alive now, from which on the peak counts anew."""
        self.peak = self.alive
        return self.alive

    def ignore(self, *tensors: Tensor) -> None:
        """Tensors that are there already and do not count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in results:
            self._hold(tensor)
        if not func.is_view and func._schema.name not in _FREE:
            self.work[self._cost(func, args, kwargs or {}, out, results)] += 1
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen and self._seen[key]() is not None:
            return

        def freed(_: Any) -> None:
            self.alive -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _cost(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> Work:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        moved = float(sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in (*inputs, *results)))
        space, name = func._schema.name.split("::")
        if space == "ssmkernels":
            return self._of_op(name, args, moved)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            return Work(self.phase, MATRIX, float(formula(*args, **kwargs, out_val=out)), moved)
        return Work(self.phase, MEMORY, 0.0, moved)

    def _of_op(self, name: str, args: Any, moved: float) -> Work:
        backward = name.endswith("_backward")
        op = name.removesuffix("_backward").rpartition("_")[0]
        flops, sizes = op_flops(op, args)
        self.sizes[op] = self.sizes.get(op) or sizes
        return Work(self.phase, op, flops * (BACKWARD_FLOPS if backward else 1.0), moved)


_FREE = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"})


_specs = functools.cache(specs)


def op_flops(op: str, args: Any) -> tuple[float, dict[str, Any]]:
    """Floating-point operations of a call's forward pass, as the op's specification counts them, and the call's sizes.

    0 where it has none. Of attention, the pairs that a causal mask and a window leave.
    """
    if op not in OPS:
        return 0.0, {}
    declared = OPS[op].declared
    a = declared.Arguments(*args[: len(declared.takes)])
    sizes = declared.sizes(a)
    if op == "attention":
        seen = pairs(sizes["l"], (a.left, a.right), False)
        given = {name: sizes[name] for name in ("b", "l", "h", "h_kv", "k") if name in sizes}
        return 2.0 * sizes["b"] * sizes["h"] * seen * (a.q.shape[-1] + a.v.shape[-1]), given
    if op not in _specs():
        return 0.0, {}
    spec = _specs()[op]
    given = {key: sizes[key] for key in spec.base if key in sizes}
    given |= {"complex": any(isinstance(x, Tensor) and x.is_complex() for x in a)} if "complex" in spec.base else {}
    given |= {"length": a.length} if "length" in spec.base else {}
    given |= {"shape": tuple(getattr(a, declared.leader).shape)} if "shape" in spec.base else {}
    given |= {key: None for key in ("gate", "residual", "z") if key in spec.base and getattr(a, key) is None}
    return spec.flops({**spec.base, **given}), given


def pairs(length: int, window: Any, causal: bool) -> float:
    """Pairs of query and key in a sequence that a mask leaves; ``window`` is (left, right), -1 for no bound."""
    left, right = window or (-1, -1)
    right = 0 if causal else right
    before = length if left < 0 else min(left + 1, length)
    after = length if right < 0 else min(right + 1, length)
    return _triangle(length, before) + _triangle(length, after) - length


def _triangle(length: float, reach: float) -> float:
    """Pairs of a token and one of the ``reach`` up to it."""
    return reach * length - reach * (reach - 1) / 2


class Gauge:
    """Counts pieces of a model at any length, and remembers which of them loop over time in Python."""

    def __init__(self) -> None:
        self._loops: dict[str, bool] = {}

    def counted(self, name: str, make: Piece, length: int) -> Counts:
        """The counts of a piece at a length.

        What loops over time is counted at two short lengths and is, in each of its numbers, a straight line.

        Args:
            name: of the piece; the same at every length.
            make: a length → what runs the piece, and the tensors that are there before: weights and inputs.
        """
        if length <= LOOPED or not self._loop(name, make):
            return _run(make, length)[0]
        low, high = (_run(make, l)[0] for l in (LOOPED // 2, LOOPED))
        share = (length - LOOPED // 2) / (LOOPED - LOOPED // 2)
        return high.combined(low, share, 1 - share)

    def _loop(self, name: str, make: Piece) -> bool:
        if name not in self._loops:
            self._loops[name] = _run(make, 8)[1] != _run(make, 16)[1]
        return self._loops[name]


LOOPED = 32  # tokens of the longer one

_running: list[Tally] = []


def note_loss(gradient: Tensor) -> None:
    """A hook on what the layers give: its gradient is there, and what the head and the loss needed for it."""
    if _running:
        _running[-1].loss_peak = _running[-1].peak


def _run(make: Piece, length: int) -> tuple[Counts, int]:
    call, given = make(length)
    with Tally() as tally:
        _running.append(tally)
        tally.ignore(*given)
        y = call()
        kept, forward_peak = tally.alive, tally.peak
        calls = tally.calls
        tally.phase = BACKWARD
        tally.mark()
        gradient = torch.empty_like(y)
        y.backward(gradient)
        del y, gradient
        _running.pop()
    loss_peak = tally.peak if tally.loss_peak is None else tally.loss_peak
    return Counts(dict(tally.work), kept, forward_peak, tally.peak, loss_peak, tally.sizes), calls


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Modules and tensors are made on the meta device, and random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield
