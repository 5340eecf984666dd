"""Running an implementation for inspection: results and gradients by name, poisoned memory, single sequences."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.spec import Draw, Spec, tensors_of


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that a call gives, detached: results, arguments that it wrote, and gradients ("gradient of u")."""

    tensors: dict[str, Tensor]


def run(
    spec: Spec,
    implementation: str | Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    gradients: bool = True,
    seed: int = 0,
    noise: float = 0.0,
) -> Results:
    """Calls an implementation and, where the op has gradients, its backward pass.

    Args:
        implementation: a name, or a function with the public function's signature.
        arguments: of the public function; what it writes is written.
        gradients: whether to ask for them.
        seed: of the gradients that come in.
        noise: relative size of a disturbance of those.
    """
    arguments = dict(arguments)
    inputs = {}
    if gradients and spec.differentiable:
        for name, value in arguments.items():
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                arguments[name] = inputs[name] = value.detach().requires_grad_()
    with _poisoned():
        returned = _call(spec, implementation, arguments)
        results = dict(zip(spec.results, tensors_of(returned), strict=False))
        tensors = {name: value.detach() for name, value in results.items()}
        tensors |= {name: arguments[name] for name in spec.mutates}
        if inputs:
            incoming = [_incoming(value, seed + i, noise) for i, value in enumerate(results.values())]
            pairs = [
                (value, gradient)
                for value, gradient in zip(results.values(), incoming, strict=True)
                if value.requires_grad
            ]
            found: tuple[Tensor | None, ...] = (None,) * len(inputs)
            if pairs:
                values, gradients_in = zip(*pairs, strict=True)
                found = torch.autograd.grad(values, list(inputs.values()), gradients_in, allow_unused=True)
            for (name, value), gradient in zip(inputs.items(), found, strict=True):
                tensors[f"gradient of {name}"] = torch.zeros_like(value) if gradient is None else gradient
    return Results(tensors)


def _call(spec: Spec, implementation: str | Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    if isinstance(implementation, str):
        return spec.function()(**arguments, implementation=implementation)
    return implementation(**arguments)


def _incoming(result: Tensor, seed: int, noise: float) -> Tensor:
    """A gradient for a result: sixteenths, which every dtype holds exactly."""
    draw = Draw(seed)
    values = (draw.normal(*result.shape) * 16).round().clamp(-64, 64) / 16
    if result.is_complex():
        values = torch.complex(values, values.flip(-1))
    return (values * (1 + noise * draw.normal(*result.shape).sign())).to(result.device, result.dtype)


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
    """One sequence of a call: where it lies in each batched argument and in each result."""

    spec: Spec
    arguments: Mapping[str, Any]
    row: int

    @classmethod
    def of(cls, spec: Spec, arguments: Mapping[str, Any]) -> Member | None:
        """The longest sequence of a packed call, or the middle row of a batch; None where there is but one."""
        borders = arguments.get("cu_seqlens")
        if borders is not None:
            return None if len(borders) < 3 else cls(spec, arguments, int(borders.diff().argmax()))
        rows = [arguments[name].shape[0] for name in spec.batched if arguments.get(name) is not None]
        return cls(spec, arguments, rows[0] // 2) if rows and rows[0] > 1 else None

    def place(self, name: str) -> tuple[slice, ...] | None:
        """Its part of a batched argument, of a result, or of a gradient; None where it has none of its own."""
        name = name.removeprefix("gradient of ")
        time_axis = 1
        if name in self.spec.batched:
            borders = self.arguments.get(self.spec.batched[name]) if self.spec.batched[name] else None
            if borders is None and self.spec.batched[name]:
                borders = self.arguments.get("cu_seqlens")
        elif name in self.spec.results:
            time_axis = self.spec.results[name]
            borders = self.arguments.get("cu_seqlens") if time_axis >= 0 else None
        else:
            return None
        if borders is None:
            return (slice(self.row, self.row + 1),)
        start, end = borders[self.row : self.row + 2].tolist()
        return (slice(None),) * time_axis + (slice(start, end),)

    def poison_others(self) -> dict[str, Any]:
        """The arguments, with NaN written into every other sequence; the memory layout stays."""
        for name in self.spec.batched:
            value = self.arguments.get(name)
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                mine = value[self.place(name)].clone()
                value.fill_(float("nan"))[self.place(name)] = mine
        return dict(self.arguments)

    def alone(self) -> dict[str, Any]:
        """The arguments of a call with nothing but this sequence."""
        changed = {name: None if name.startswith("cu_seqlens") else value for name, value in self.arguments.items()}
        for name in self.spec.batched:
            if changed.get(name) is not None:
                changed[name] = changed[name][self.place(name)]
        return changed
