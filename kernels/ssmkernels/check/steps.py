"""The specification of an op's step, one token of it, from the op's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.core.names import OPS

_ONE_TOKEN = {"l": 1, "packed": False, "state": True}  # what a step is, in the words of all recurrences' cases


def step_of(whole: Spec, *, without: Sequence[str] = (), rows: Sequence[Case] = (), bench: Case | None = None) -> Spec:
    """The specification of ``<op>_step``, whose cases are the op's own with one token and a state.

    Args:
        whole: the op's.
        without: keys of its cases that a step has not; they stay at the base's values.
        rows: further rows, beside those of the op that a step can have and one in the layout "far".
        bench: sizes for the benchmark where they are not the op's.
    """
    base = {key: value for key, value in whole.base.items() if key not in (*_ONE_TOKEN, *without)}
    fixed = {key: whole.base[key] for key in without} | _ONE_TOKEN
    name = f"{whole.op}_step"

    def make(case: Case, draw: Draw) -> dict[str, Any]:
        arguments = whole.make({**case, **fixed}, draw)
        borders = OPS[whole.op].declared.per_sequence(arguments)
        taken = OPS[name].declared.annotations
        step = {
            argument.removeprefix("initial_"): value[:, 0] if borders.get(argument) else value
            for argument, value in arguments.items()
        }
        return {argument: value for argument, value in step.items() if argument in taken}

    def wide(case: Case) -> list[str]:
        return [argument.removeprefix("initial_") for argument in whole.float32({**case, **fixed})]

    return Spec(
        op=name,
        base=base,
        rows=(*(row for row in whole.rows if set(row) <= {*base, "layout"}), {"layout": "far"}, *rows),
        make=make,
        flops=lambda case: whole.flops({**case, **fixed}),
        bench={key: value for key, value in whole.bench.items() if key in base} | dict(bench or {}),
        wide=wide,
        differentiable=False,
        dtypes=whole.dtypes,
    )
