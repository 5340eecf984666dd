"""What testing and benchmarks need to know of an op: cases, inputs and cost. Each op's own is in its ``spec.py``."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.block_mask import BlockMask
from ssmkernels.core.declaration import Declaration
from ssmkernels.core.names import OPS, unknown

Case = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """One op's specification.

    Attributes:
        op: the public function's name.
        base: the base case: sizes and switches, by names that ``make`` knows. ``layout`` is known to all: "contiguous",
            "strided" (gaps of NaN between elements) or "far" (offsets beyond 2³¹ elements).
        rows: further cases; each varies the base in one thing or few.
        make: case and source of randomness → the public function's arguments, as float64 or complex128 on the CPU.
        flops: case → floating-point operations of a forward pass.
        bench: sizes, over the base, that stand for real use.
        wide: case → arguments that stay float32 beside half-precision ones. If None, those that the op declares as
            sums, and those that it declares as wide where the case's "weights" are "float32".
        differentiable: whether gradients are part of it.
        dtypes: what it takes.
        exact: implementations whose bits depend on neither the batch nor the number of threads; elsewhere a library's
            matrix product or FFT decides.
    """

    op: str
    base: Case
    rows: Sequence[Case]
    make: Callable[[Case, Draw], dict[str, Any]]
    flops: Callable[[Case], float]
    bench: Case
    wide: Callable[[Case], Sequence[str]] | None = None
    differentiable: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    exact: tuple[str, ...] = ("cpu", "triton")

    @property
    def declared(self) -> Declaration:
        """The op's declaration."""
        return OPS[self.op].declared

    @property
    def results(self) -> Mapping[str, int]:
        """What the function returns: name → its time axis, along which a packed batch is cut; -1 without one."""
        return self.declared.time_axes

    @property
    def mutates(self) -> tuple[str, ...]:
        """Arguments that the function writes; they count as results."""
        return self.declared.mutates

    def float32(self, case: Case) -> Sequence[str]:
        """Arguments that stay float32 beside half-precision ones."""
        if self.wide is not None:
            return self.wide(case)
        return (*self.declared.sums, *(self.declared.wide if case.get("weights") == "float32" else ()))

    def cases(self) -> list[Case]:
        """The base case and every row's."""
        return [self.case({}), *(self.case(row) for row in self.rows)]

    def case(self, row: Case) -> Case:
        """The base with a row's changes.

        Raises:
            ValueError: the row names something that the base has not.
        """
        for key in row:
            if key not in self.base and key != "layout":
                raise ValueError(unknown(f"key of a case of {self.op}", key, [*self.base, "layout"]))
        return {"layout": "contiguous", **self.base, **row}

    def row(self, case: Case) -> dict[str, Any]:
        """What a case changes in the base."""
        base = self.case({})
        return {key: value for key, value in case.items() if value != base[key]}

    def inputs(self, case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
        """The public function's arguments for a case: rounded to ``dtype``, in the case's layout, without gradients."""
        arguments = self.make(case, Draw(seed))
        batched, wide = self.declared.per_sequence(arguments), self.float32(case)
        return {
            name: lay_out(_cast(value, dtype, name in wide).to(device), case["layout"], name in batched)
            if isinstance(value, Tensor)
            else value.to(device)
            if isinstance(value, BlockMask)
            else value
            for name, value in arguments.items()
        }

    def function(self) -> Callable[..., Any]:
        """The public function; where it takes tuples of tensors, the one within it that takes each tensor by itself."""
        public = getattr(importlib.import_module(OPS[self.op].package), self.op)
        return getattr(public, "unbundled", public)

    def bytes(self, case: Case, dtype: torch.dtype) -> float:
        """The least bytes of a forward pass: every argument read once, every result written once."""
        arguments = self.inputs(case, dtype, "cpu", 0)
        results = tensors_of(self.function()(**arguments))
        return sum(t.nbytes for t in (*arguments.values(), *results) if isinstance(t, Tensor))


class Draw:
    """Seeded random float64 tensors on the CPU."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Gaussian of standard deviation ``scale``."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale

    def complex_normal(self, *shape: int) -> Tensor:
        """Complex Gaussian of variance 1."""
        return torch.complex(self.normal(*shape), self.normal(*shape)) / math.sqrt(2)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform in [low, high)."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def borders(self, length: int) -> Tensor:
        """int32 borders of packed sequences in ``length``: one of one token, an empty one, the rest in two."""
        one = min(1, length)
        return torch.tensor([0, one, one, max(one, length // 2), length], dtype=torch.int32)

    def sequences(self, case: Case) -> tuple[Tensor | None, int]:
        """The borders of a case that is packed, and how many sequences it has: of length ``l`` in a batch of ``b``."""
        borders = self.borders(case["l"]) if case["packed"] else None
        return borders, case["b"] if borders is None else len(borders) - 1

    def carried(
        self, case: Case, number: Callable[..., Tensor] | None = None, **states: tuple[int, ...]
    ) -> dict[str, Any]:
        """What recurrences take last: the states before the first token, if a case has them, and its borders.

        Args:
            number: draws the states; :meth:`normal` if None.
            states: argument → its shape, but for the axis of sequences.
        """
        borders, s = self.sequences(case)
        drawn = {name: (number or self.normal)(s, *shape) if case["state"] else None for name, shape in states.items()}
        return {**drawn, "return_final_state": True, "cu_seqlens": borders}


def specs() -> dict[str, Spec]:
    """The specification of every op that has one, by the op's name."""
    found = {}
    for package in sorted({op.package for op in OPS.values()}):
        if importlib.util.find_spec(f"{package}.spec") is not None:
            for spec in importlib.import_module(f"{package}.spec").SPECS:
                found[spec.op] = spec
    return found


def spec_of(op: str) -> Spec:
    """The specification of an op.

    Raises:
        ValueError: there is no such op; says which there are and the nearest.
    """
    found = specs()
    if op not in found:
        raise ValueError(unknown("op", op, found))
    return found[op]


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """What a public function returned, as a tuple of tensors."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _cast(value: Tensor, dtype: torch.dtype, wide: bool) -> Tensor:
    if value.is_complex():
        return value if dtype == torch.float64 else value.to(torch.complex64)
    if not value.is_floating_point():
        return value
    return value.to(torch.promote_types(dtype, torch.float32) if wide else dtype)


def lay_out(value: Tensor, layout: str, batched: bool = False) -> Tensor:
    """The same values in another memory layout; "far" is for tensors that belong to single sequences."""
    if layout == "contiguous" or value.ndim == 0 or not (value.is_floating_point() or value.is_complex()):
        return value
    if layout == "strided":
        gaps = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), float("nan"))
        return gaps[..., ::2].copy_(value)
    axis = 1 if value.ndim > 2 else 0
    if not batched or value.shape[axis] < 2:
        return value
    # Memory that is set aside and, but for a few pages, never touched.
    rows = value.movedim(axis, 0)
    step = max(2**31 // (len(rows) - 1) + 1, rows[0].numel())
    storage = value.new_empty((len(rows) - 1) * step + rows[0].numel())
    far = storage.as_strided(rows.shape, (step, *rows[0].contiguous().stride()))
    return far.copy_(rows).movedim(0, axis)
