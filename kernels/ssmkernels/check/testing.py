"""Any implementation of an op against its float64 reference.

    ssmkernels.testing.check("selective_scan", "tiled")         # one of ours
    ssmkernels.testing.check("selective_scan", my_function)     # yours, under the public function's signature

The rule is a budget, not a tolerance (:mod:`ssmkernels.check.budget`): at most twice the error of the reference run in
the same dtype, plus a rounding band.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmkernels.check.budget import Truth, differs
from ssmkernels.check.report import Check, Report
from ssmkernels.check.running import Member, Results, run, threads, with_gradients
from ssmkernels.check.spec import Case, Spec, spec_of
from ssmkernels.check.truths import truths_of
from ssmkernels.core import triton_support
from ssmkernels.core.dispatch import explain
from ssmkernels.core.names import OPS, unknown

__all__ = ["Check", "Examination", "Report", "check"]


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
    quick: bool = False,
) -> Report:
    """Checks an implementation over cases and dtypes.

    For each: outputs, final states and every gradient against the budget, and outputs once more where no gradient is
    wanted; memory is poisoned with NaN before it is written; the arguments stay as they were; the same call twice gives
    the same bits (not in Triton's interpreter, where it could not give others); NaN in one sequence stays there.

    Args:
        op: the op's name.
        implementation: one of its implementations by name, or a function that takes and returns what the public one
            does. For what it does not do it may raise NotImplementedError, or lack the argument: the report lists that
            as skipped.
        cases: rows, that is changes of the op's base case such as ``{"l": 33}``; all of its spec's if None.
        dtypes: those of the spec if None.
        device: where it runs.
        gradients: whether to check them.
        seed: of the inputs.
        raises: whether a failure raises, or only stands in the report.
        quick: whether to work out each budget only as far as an error needs it. The verdicts are the same, in about
            half the time; the report then shows larger parts of budgets than were used.

    Returns:
        A report, which prints as a table.

    Raises:
        AssertionError: something is over its budget: the worst element's index, both values, and a line that reproduces
            it. Or nothing could be checked at all.
        ValueError: no such op or implementation, or a case that it does not know.
    """
    spec = spec_of(op)
    if isinstance(implementation, str) and implementation not in OPS[op].names:
        raise ValueError(unknown(f"implementation of {op}", implementation, OPS[op].names))
    report = Report(op, _name(implementation))
    for case in spec.cases() if cases is None else [spec.case(row) for row in cases]:
        for dtype in spec.dtypes if dtypes is None else dtypes:
            examination = Examination(spec, implementation, case, dtype, torch.device(device), gradients, seed, quick)
            with threads(1):  # of tiny inputs several would only wait for one another
                found, why = examination.checks()
            report.checks += found
            if why:
                report.skipped.append((examination.row, examination.dtype_name, why))
            failed = [c for c in found if c.failure]
            if failed and raises:
                raise AssertionError(f"{op}: {report.implementation}: {failed[0]}")
    if raises and report.skipped and not report.checks:
        raise AssertionError(f"{op}: {report.implementation}: nothing was checked: {report.skipped[0][2]}")
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
    quick: bool = False

    @property
    def row(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec.row(self.case).items()) or "base"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def line(self) -> str:
        """A line of Python that does the same check again."""
        given = repr(self.implementation) if isinstance(self.implementation, str) else _name(self.implementation)
        more = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
        more += "" if self.gradients else ", gradients=False"
        return (
            f"ssmkernels.testing.check({self.spec.op!r}, {given}, cases=[{self.spec.row(self.case)!r}], "
            f"dtypes=[{self.dtype}]{more}, seed={self.seed})"
        )

    def inputs(self) -> dict[str, Any]:
        return self.spec.inputs(self.case, self.dtype, self.device, self.seed)

    def checks(self) -> tuple[list[Check], str]:
        """Runs everything: what was checked, and why something was not. An exception is a failure like any other."""
        try:
            return self._checks()
        except RuntimeError as error:
            if not self._no_room(error):
                raise
            return [], "this machine has no room for offsets beyond 2³¹"

    def _no_room(self, error: Exception) -> bool:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        return out_of_memory and self.case["layout"] == "far"

    def _checks(self) -> tuple[list[Check], str]:
        gradients = self.gradients and self.spec.differentiable
        why = self._impossible(gradients)
        if why and gradients and not self._impossible(False):
            gradients, why = False, f"gradients: {why}"
        elif why:
            return [], why
        truths = truths_of(self.spec, tuple(self.case.items()), self.dtype, self.device, gradients, self.seed)
        found: list[Check] = []
        try:
            arguments = self.inputs()
            first = self._run(arguments, gradients)
            found += [self._compare(what, first, truth) for what, truth in truths.items()]
            found.append(self._left_alone(arguments))
            if not (self.implementation == "triton" and triton_support.interpreting()):  # there no two calls can differ
                found.append(self._again(first, gradients))
            if gradients:
                forward = self._run(self.inputs(), False)
                own = {what: truth for what, truth in truths.items() if what in self.spec.results}
                found += [self._compare(what, forward, truth, ", no gradient wanted") for what, truth in own.items()]
            found += self._alone(first, gradients)
        except NotImplementedError as error:
            if isinstance(self.implementation, str):
                found.append(self._check("runs", math.inf, f"it raises NotImplementedError: {error}"))
            else:
                return [], str(error) or "not implemented"
        except Exception as error:  # a kernel may raise anything
            if self._no_room(error):
                raise
            found.append(self._check("runs", math.inf, f"it raises {type(error).__name__}: {error}"))
        return found, why

    def _again(self, first: Results, gradients: bool) -> Check:
        exact = self.implementation in self.spec.exact
        with threads(3 if exact else 1):
            second = self._run(self.inputs(), gradients, poison=False)
        again = self._same_bits("the same call twice", first, second)
        if again.failure and not exact:  # poisoning turns on PyTorch's deterministic kernels
            third = self._run(self.inputs(), gradients, poison=False)
            again = self._same_bits("the same call twice", second, third)
        return again

    def _impossible(self, gradients: bool) -> str:
        """Why the implementation cannot run this case; empty where it can."""
        arguments = self.inputs()
        if not isinstance(self.implementation, str):
            return ""
        explanation = explain(self.spec.function(), **(with_gradients(arguments) if gradients else arguments))
        return "" if self.implementation in explanation.able else explanation.reasons[self.implementation]

    def _run(self, arguments: Mapping[str, Any], gradients: bool, **how: Any) -> Results:
        how = {"seed": self.seed, "layout": self.case["layout"], **how}
        return run(self.spec, self.implementation, arguments, gradients=gradients, **how)

    def _compare(self, what: str, got: Results, truth: Truth, how: str = "") -> Check:
        """One result or gradient against its budget."""
        actual, peer = got.tensors.get(what), truth.peer
        name = what + how
        if actual is None or (what in got.missing and truth.exact.any()):
            return self._check(name, math.inf, f"{name}: there is none")
        if actual.shape != peer.shape or actual.dtype != peer.dtype or actual.device != peer.device:
            came, wanted = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (actual, peer))
            return self._check(name, math.inf, f"{name} is {came}, expected {wanted}")
        used = truth.used(actual, quick=self.quick)
        if used <= 1:
            return self._check(name, used)
        place = truth.worst(actual)
        shown = f"{name} is {_show(actual[place])} at {place}, expected {_show(truth.exact[place])}"
        return self._check(name, used, f"{shown}: the error is {used:.3g} times what is allowed")

    def _left_alone(self, arguments: Mapping[str, Any]) -> Check:
        """Nothing may write to its arguments but what the op says."""
        what = "arguments left alone"
        for name, before in self.inputs().items():
            if isinstance(before, Tensor) and name not in self.spec.mutates:
                place = differs(arguments[name], before)
                if place is not None:
                    now, then = _show(arguments[name][place]), _show(before[place])
                    return self._check(what, math.inf, f"it writes to its argument {name}: {then} at {place} is {now}")
        return self._check(what, 0.0)

    def _same_bits(self, what: str, first: Results, second: Results) -> Check:
        for name in first.tensors:
            a, b = first.tensors[name], second.tensors[name]
            place = differs(a, b) if a.shape == b.shape else ()
            if place is not None:
                shown = (
                    f"{_show(a[place])}, then {_show(b[place])} at {place}" if a.shape == b.shape else "another shape"
                )
                return self._check(what, math.inf, f"{what} gives another {name}: {shown}")
        return self._check(what, 0.0)

    def _alone(self, whole: Results, gradients: bool) -> list[Check]:
        """One sequence beside NaN, and for our own kernels by itself: the same bits as in the batch."""
        sequence = Member.of(self.spec, self.inputs())
        if sequence is None:
            return []
        mine = sequence.own(whole)
        found = []
        if self.implementation in self.spec.exact:
            alone = self._run(sequence.alone(), gradients, incoming=sequence.own_incoming(whole))
            alone = Results({name: alone.tensors[name] for name in mine.tensors})
            found.append(self._same_bits("the sequence alone", mine, alone))
        beside = sequence.own(self._run(sequence.poison_others(), gradients))
        return [*found, self._same_bits("NaN in the other sequences", mine, beside)]

    def _check(self, what: str, used: float, failure: str = "") -> Check:
        return Check(self.row, self.dtype_name, what, used, failure, self.line() if failure else "")


def _name(implementation: str | Callable[..., Any]) -> str:
    name = implementation if isinstance(implementation, str) else getattr(implementation, "__name__", "")
    return name if name.isidentifier() else "function"


def _show(value: Tensor) -> str:
    return f"{value.item():.8g}"
