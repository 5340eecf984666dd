"""A plain call of an op, which other ways to call it are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmkernels.check.spec import Spec, tensors_of
from ssmkernels.check.wrapper import floating
from ssmkernels.core.names import OPS

Arguments = dict[str, Any]
Results = list[Tensor]


class Refused(Exception):
    """A way that an op does not go, and says so; the message is why."""


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """The same numbers to rounding in float64, where inputs are."""
    return all(torch.allclose(x, y) for x, y in zip(found, expected, strict=True))


class PlainCall:
    """The base case of an op in float64, and what the reference gives: outputs, and states that the op writes."""

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
        return self._outputs(inputs, by)[0]

    def all_outputs(self, *inputs: Tensor, by: str | None = None) -> Tensor:
        """As :meth:`output`, of all outputs: as it is, or as the numbers of each after those of the one before."""
        return joined(self._outputs(inputs, by))

    def _outputs(self, inputs: tuple[Tensor, ...], by: str | None) -> tuple[Tensor, ...]:
        arguments = self.fresh(**dict(zip(self.inputs, inputs, strict=False)))
        return tensors_of(self.function(**arguments, implementation=by))

    def values(self) -> tuple[Tensor, ...]:
        return tuple(self.arguments[name] for name in self.inputs)

    def reference(self, arguments: Arguments) -> Results:
        return self.results(arguments, implementation="reference")

    def rows(self) -> list[str]:
        """Arguments whose first axis is the batch."""
        least = OPS[self.op].batched
        return [n for n, a in self.arguments.items() if n in least and isinstance(a, Tensor) and a.ndim >= least[n]]


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """A single output as it is, or the numbers of each of several after those of the one before."""
    return outputs[0] if len(outputs) == 1 else torch.cat([output.flatten() for output in outputs])
