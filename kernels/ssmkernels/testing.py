"""Any implementation of an op against its float64 reference.

    ssmkernels.testing.check("selective_scan", "tiled")         # one of ours
    ssmkernels.testing.check("selective_scan", my_function)     # yours, under the public function's signature

The rule is a budget, not a tolerance. The error of an implementation, in every output, gradient and final state, may be at
most twice that of the reference run in the same dtype, plus a rounding band: how far the float64 reference itself moves
when its inputs are rounded once more. Both the largest error and the root mean square count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmkernels.dispatch import OPS, explain, unknown
from ssmkernels.running import Member, Results, run
from ssmkernels.spec import Case, Draw, Spec, spec_of
from ssmkernels.validate import HALF

# The band is this many times the movement seen: that is of one rounding of each input, and a computation has several.
BAND = 16.0

# Implementations whose every row must have the same bits whatever the batch; elsewhere a library's matrix product decides.
EXACT = ("cpu", "triton")


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing checked: its error as a fraction of what is allowed, and, where it failed, why."""

    row: str
    dtype: str
    what: str
    used: float
    failure: str = ""


@dataclasses.dataclass
class Report:
    """All checks of one implementation of an op. ``skipped`` says which cases it cannot run, and why."""

    op: str
    implementation: str
    checks: list[Check] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.failure]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation}: {len(self.checks)} checks, {len(self.failures)} failed"]
        lines.append(f"  {'case':<44} {'dtype':<9} {'checks':>6} {'worst':>7}  (error as a part of its budget)")
        for (row, dtype), group in _grouped(self.checks).items():
            worst = max(group, key=lambda c: c.used)
            lines.append(f"  {row:<44} {dtype:<9} {len(group):>6} {worst.used:>7.2f}  {worst.what}")
        lines += [f"  {row:<44} {dtype:<9} skipped: {why}" for row, dtype, why in self.skipped]
        return "\n".join(lines)


def check(
    op: str,
    implementation: str | Callable[..., Any],
    *,
    cases: Iterable[Case] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    gradients: bool = True,
    seed: int = 0,
    raises: bool = True,
) -> Report:
    """Checks an implementation over cases and dtypes.

    For each: outputs, final states and every gradient against the budget; outputs are poisoned with NaN before they are
    written; the same call twice gives the same bits; NaN in one sequence stays there.

    Args:
        op: the op's name.
        implementation: one of its implementations by name, or a function that takes and returns what the public one does.
        cases: rows, that is changes of the op's base case such as ``{"l": 33}``; all of its spec's if None.
        dtypes: those of the spec if None.
        device: where it runs.
        gradients: whether to check them.
        seed: of the inputs.
        raises: whether a failure raises, or only stands in the report.

    Returns:
        A report, which prints as a table.

    Raises:
        AssertionError: something is over its budget: the worst element's index, both values, and a line that reproduces it.
        ValueError: no such op or implementation, or a case that it does not know.
    """
    spec = spec_of(op)
    if isinstance(implementation, str) and implementation not in OPS[op].names:
        raise ValueError(unknown(f"implementation of {op}", implementation, OPS[op].names))
    name = implementation if isinstance(implementation, str) else getattr(implementation, "__name__", "function")
    report = Report(op, name)
    for case in spec.cases() if cases is None else [spec.case(row) for row in cases]:
        for dtype in spec.dtypes if dtypes is None else dtypes:
            examination = Examination(spec, implementation, case, dtype, torch.device(device), gradients, seed)
            why = examination.impossible()
            if why:
                report.skipped.append((examination.row, examination.dtype_name, why))
                continue
            found = examination.checks()
            report.checks += found
            failed = [c for c in found if c.failure]
            if failed and raises:
                raise AssertionError(f"{op}: {name}: {failed[0].failure}\n  {examination.line()}")
    return report


@dataclasses.dataclass(frozen=True)
class Examination:
    """One implementation, one case, one dtype."""

    spec: Spec
    implementation: str | Callable[..., Any]
    case: Case
    dtype: torch.dtype
    device: torch.device
    gradients: bool
    seed: int

    @property
    def row(self) -> str:
        row = self.spec.row(self.case)
        return ", ".join(f"{key}={value}" for key, value in row.items()) or "base"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def line(self) -> str:
        """A line of Python that does the same check again."""
        given = repr(self.implementation) if isinstance(self.implementation, str) else self.implementation.__name__
        where = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
        return (
            f"ssmkernels.testing.check({self.spec.op!r}, {given}, cases=[{self.spec.row(self.case)!r}], "
            f"dtypes=[{self.dtype}]{where}, seed={self.seed})"
        )

    def inputs(self) -> dict[str, Any]:
        return self.spec.inputs(self.case, self.dtype, self.device, self.seed)

    def impossible(self) -> str:
        """Why the implementation cannot run this case; empty where it can."""
        if not isinstance(self.implementation, str):
            return ""
        explanation = explain(self.spec.op, **self.inputs())
        return "" if self.implementation in explanation.able else explanation.reasons[self.implementation]

    def checks(self) -> list[Check]:
        """Runs everything. An exception in the implementation is a failure like any other."""
        truth = self._run("reference", _widened(self.inputs()))
        same = self._run("reference", self.inputs())
        moved = [self._run("reference", self._moved(draw), noise=torch.finfo(self.dtype).eps) for draw in (1, 2)]
        try:
            first, second = (
                self._run(self.implementation, self.inputs()),
                self._run(self.implementation, self.inputs()),
            )
            found = [self._compare(what, first, truth, same, moved) for what in truth.tensors]
            found.append(self._same_bits("the same call twice", first, second))
            found += self._alone(first)
        except Exception as error:  # a kernel may raise anything
            return [self._check("runs", math.inf, f"it raises {type(error).__name__}: {error}")]
        return found

    def _run(
        self, implementation: str | Callable[..., Any], arguments: Mapping[str, Any], noise: float = 0.0
    ) -> Results:
        return run(self.spec, implementation, arguments, gradients=self.gradients, seed=self.seed, noise=noise)

    def _moved(self, seed: int) -> dict[str, Any]:
        """The float64 arguments with every number off by one rounding."""
        draw = Draw(seed)
        moved = {}
        for name, value in _widened(self.inputs()).items():
            moved[name] = value
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                wide = name in self.spec.wide and self.dtype in HALF
                eps = torch.finfo(torch.float32 if wide else self.dtype).eps
                moved[name] = value * (1 + eps * draw.normal(*value.shape).sign().to(value.device))
        return moved

    def _compare(self, what: str, got: Results, truth: Results, same: Results, moved: Sequence[Results]) -> Check:
        """One result or gradient against its budget."""
        actual, expected, peer = got.tensors.get(what), truth.tensors[what], same.tensors[what]
        if actual is None:
            return self._check(what, math.inf, f"{what}: there is none")
        if actual.shape != peer.shape or actual.dtype != peer.dtype:
            came, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (actual, peer))
            return self._check(what, math.inf, f"{what} is {came}, expected {wanted}")
        if expected.numel() == 0:
            return self._check(what, 0.0, "")
        error, allowed = _distance(actual, expected), 2 * _distance(peer, expected)
        band = BAND * torch.stack([_distance(m.tensors[what], expected) for m in moved]).amax(0)
        floor = torch.finfo(peer.dtype).eps * float(expected.abs().nan_to_num(0, 0, 0).max())
        used = max(_part(norm(error), norm(allowed) + norm(band) + floor) for norm in (_largest, _root_mean_square))
        if used <= 1:
            return self._check(what, used, "")
        place = tuple(int(i) for i in torch.unravel_index(error.argmax().cpu(), error.shape))
        return self._check(
            what,
            used,
            f"{what} is {_show(actual[place])} at {place}, expected {_show(expected[place])}: "
            f"off by {used:.3g} times what is allowed",
        )

    def _same_bits(self, what: str, first: Results, second: Results) -> Check:
        for name in first.tensors:
            if not _equal(first.tensors[name], second.tensors[name]):
                return self._check(what, math.inf, f"{what} gives another {name}")
        return self._check(what, 0.0, "")

    def _alone(self, whole: Results) -> list[Check]:
        """One sequence beside NaN, and for our own kernels by itself: the same bits as in the batch."""
        inputs = self.inputs()
        sequence = Member.of(self.spec, inputs)
        if sequence is None:
            return []
        own = [name for name in whole.tensors if sequence.place(name) is not None]
        mine = Results({name: whole.tensors[name][sequence.place(name)] for name in own})
        found = []
        if self.implementation in EXACT:
            found.append(self._same_bits("the sequence alone", mine, self._run(self.implementation, sequence.alone())))
        beside = self._run(self.implementation, sequence.poison_others())
        beside = Results({name: beside.tensors[name][sequence.place(name)] for name in own})
        return [*found, self._same_bits("NaN in the other sequences", mine, beside)]

    def _check(self, what: str, used: float, failure: str) -> Check:
        return Check(self.row, self.dtype_name, what, used, failure and f"[{self.row}; {self.dtype_name}] {failure}")


def _widened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same numbers in double precision."""
    wider = {}
    for name, value in arguments.items():
        wider[name] = value
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            wider[name] = value.to(torch.complex128 if value.is_complex() else torch.float64)
    return wider


def _distance(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected| in float64; 0 where both are the same infinity or both NaN, ∞ where only one is."""
    actual = actual.to(expected.dtype)
    distance = (actual - expected).abs().nan_to_num(math.inf, math.inf)
    return torch.where((actual == expected) | (actual.isnan() & expected.isnan()), 0, distance)


def _largest(x: Tensor) -> float:
    return float(x.max())


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _part(error: float, budget: float) -> float:
    if error == 0 or budget == math.inf:
        return 0.0
    return error / budget if budget > 0 else math.inf


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but any NaN is as good as another."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _show(value: Tensor) -> str:
    return f"{value.item():.8g}"


def _grouped(checks: Sequence[Check]) -> dict[tuple[str, str], list[Check]]:
    groups: dict[tuple[str, str], list[Check]] = {}
    for c in checks:
        groups.setdefault((c.row, c.dtype), []).append(c)
    return groups
