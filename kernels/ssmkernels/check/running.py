"""Running an implementation for inspection: results and gradients by name, poisoned memory, single sequences."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.check.budget import moved
from ssmkernels.check.spec import Draw, Spec, lay_out, tensors_of


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that a call gives, detached: results, arguments that it wrote, and gradients ("gradient of u").

    ``missing`` are the gradients that autograd does not reach; they stand as zeros among the tensors. ``incoming`` are
    the gradients of the results that the backward pass was given.
    """

    tensors: dict[str, Tensor]
    missing: frozenset[str] = frozenset()
    incoming: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


def is_real_or_complex(value: Any) -> bool:
    """Whether it is a tensor of numbers with rounding and gradients, unlike lengths and borders."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def with_gradients(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, each tensor that can have a gradient as a leaf that wants one."""
    return {n: v.detach().requires_grad_() if is_real_or_complex(v) else v for n, v in arguments.items()}


def run(
    spec: Spec,
    implementation: str | Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    gradients: bool = True,
    seed: int = 0,
    noise: float = 0.0,
    layout: str = "contiguous",
    incoming: Mapping[str, Tensor] | None = None,
    poison: bool = True,
) -> Results:
    """Calls an implementation and, where the op has gradients, its backward pass.

    Args:
        implementation: a name, or a function with the public function's signature, or a part of it: it is not told
            what has its default.
        arguments: of the public function; what it writes is written.
        gradients: whether to ask for them.
        seed: of the gradients that come in.
        noise: relative size of a disturbance of those.
        layout: theirs in memory, "contiguous" or "strided".
        incoming: them themselves, by the result's name.
        poison: whether new memory holds NaN until it is written. PyTorch does so only in its deterministic mode.
    """
    gradients = gradients and spec.differentiable
    arguments = with_gradients(arguments) if gradients else dict(arguments)
    with _poisoned() if poison else contextlib.nullcontext():
        returned = _call(spec, implementation, arguments)
        results = dict(zip(spec.results, tensors_of(returned), strict=False))
        tensors = {name: value.detach() for name, value in results.items()}
        # A copy of what lies far apart, which would keep gigabytes of address space
        tensors |= {name: arguments[name].contiguous() for name in spec.mutates}
        if not gradients:
            return Results(tensors)
        if incoming is None:
            drawn = {name: _incoming(value, seed + i, noise) for i, (name, value) in enumerate(results.items())}
            incoming = {name: lay_out(g, layout) for name, g in drawn.items()}
        pairs = [(value, incoming[name]) for name, value in results.items() if value.requires_grad]
        inputs = {name: value for name, value in arguments.items() if is_real_or_complex(value)}
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if pairs:
            values, gradients_in = zip(*pairs, strict=True)
            found = torch.autograd.grad(values, list(inputs.values()), gradients_in, allow_unused=True)
    missing = set()
    for (name, value), gradient in zip(inputs.items(), found, strict=True):
        tensors[f"gradient of {name}"] = torch.zeros_like(value) if gradient is None else gradient
        if gradient is None:
            missing.add(f"gradient of {name}")
    return Results(tensors, frozenset(missing), incoming)


def _call(spec: Spec, implementation: str | Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    if isinstance(implementation, str):
        return spec.function()(**arguments, implementation=implementation)
    return implementation(**_known(implementation, arguments, spec.function()))


def _known(function: Callable[..., Any], arguments: Mapping[str, Any], public: Callable[..., Any]) -> Mapping[str, Any]:
    """The arguments that a function knows, where the others have their defaults in the public one.

    Raises:
        NotImplementedError: one that it does not know has another value.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a function in C, say
        return arguments
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    names = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
    defaults = inspect.signature(public).parameters
    for name, value in arguments.items():
        if name not in names and (isinstance(value, Tensor) or value != defaults[name].default):
            raise NotImplementedError(f"it takes no `{name}`")
    return {name: value for name, value in arguments.items() if name in names}


def _incoming(result: Tensor, seed: int, noise: float) -> Tensor:
    """A gradient for a result: sixteenths, which every dtype holds exactly."""
    draw = Draw(seed)
    values = (draw.normal(*result.shape) * 16).round().clamp(-64, 64) / 16
    if result.is_complex():
        values = torch.complex(values, values.flip(-1))
    return moved(values, noise, draw.normal).to(result.device, result.dtype)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, PyTorch and our native kernels work on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Inside, new memory holds NaN (the largest integer in integer tensors) until something is written to it."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Member:
    """One sequence of a call: where it lies in each argument of ``batched`` and in each result.

    Attributes:
        batched: :meth:`~ssmkernels.core.declaration.Declaration.per_sequence` of the arguments.
        results: :attr:`Spec.results`.
    """

    batched: Mapping[str, str]
    results: Mapping[str, int]
    arguments: Mapping[str, Any]
    row: int

    @classmethod
    def of(cls, spec: Spec, arguments: Mapping[str, Any]) -> Member | None:
        """The longest sequence of a packed call, or the middle row of a batch; None where there is but one."""
        batched, results = spec.declared.per_sequence(arguments), spec.results
        borders = arguments.get("cu_seqlens")
        if borders is not None:
            return None if len(borders) < 3 else cls(batched, results, arguments, int(borders.diff().argmax()))
        rows = [arguments[name].shape[0] for name in batched if arguments.get(name) is not None]
        return cls(batched, results, arguments, rows[0] // 2) if rows and rows[0] > 1 else None

    def place(self, name: str) -> tuple[slice, ...] | None:
        """Its part of a batched argument, of a result, or of a gradient; None where it has none of its own."""
        name = name.removeprefix("gradient of ")
        time_axis, borders = 1, None
        if name in self.batched:
            if self.batched[name]:
                borders = self.arguments.get(self.batched[name])
                borders = self.arguments.get("cu_seqlens") if borders is None else borders
        elif name in self.results:
            time_axis = self.results[name]
            borders = self.arguments.get("cu_seqlens") if time_axis >= 0 else None
        else:
            return None
        if borders is None:
            return (slice(self.row, self.row + 1),)
        start, end = borders[self.row : self.row + 2].tolist()
        return (slice(None),) * time_axis + (slice(start, end),)

    def own_incoming(self, results: Results) -> dict[str, Tensor]:
        """Its part of the gradients that came in."""
        return {name: gradient[self.place(name)] for name, gradient in results.incoming.items()}

    def own(self, results: Results) -> Results:
        """Its part of all results."""
        places = {name: self.place(name) for name in results.tensors}
        return Results({name: results.tensors[name][place] for name, place in places.items() if place is not None})

    def poison_others(self) -> dict[str, Any]:
        """The arguments, with NaN written into every other sequence; the memory layout stays."""
        for name in self.batched:
            value = self.arguments.get(name)
            if isinstance(value, Tensor) and is_real_or_complex(value):
                mine = value[self.place(name)].clone()
                value.fill_(float("nan"))[self.place(name)] = mine
        return dict(self.arguments)

    def alone(self) -> dict[str, Any]:
        """The arguments of a call with nothing but this sequence."""
        changed: dict[str, Any] = {n: None if n.startswith("cu_seqlens") else v for n, v in self.arguments.items()}
        for name in self.batched:
            if changed.get(name) is not None:
                changed[name] = changed[name][self.place(name)].clone()  # a step writes to its state
        return changed
