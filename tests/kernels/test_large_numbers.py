"""Numbers among the options of every op: what would be infinite in float32 is refused, where float32 computes."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from ssmkernels.check.spec import specs
from ssmkernels.core.names import OPS

NUMBERS = [
    (op, name, kind.startswith("tuple"))
    for op in sorted(specs())
    for name, kind in OPS[op].declared.annotations.items()
    if "float" in kind
]
EACH = pytest.mark.parametrize(("op", "name", "pair"), NUMBERS, ids=[f"{op}-{name}" for op, name, _ in NUMBERS])


def call(op, dtype, **options):
    spec = specs()[op]
    return spec.function()(**{**spec.inputs(spec.case({}), dtype, "cpu", 0), **options})


def test_ops_with_numbers_are_found():
    assert {("swiglu", "scale", False), ("rms_norm", "eps", False), ("ssd", "dt_limit", True)} <= set(NUMBERS)


@pytest.mark.parametrize("number", [1e39, -1e39, sys.float_info.max, 2**62 * 10.0**30])
@EACH
def test_what_float32_cannot_hold_is_refused(op, name, pair, number):
    value = ((number, math.inf) if number > 0 else (-math.inf, number)) if pair else number
    where = rf"{name}\[{int(number < 0)}\]" if pair else name
    with pytest.raises(ValueError, match=rf"{op}: `{where}` must fit in float32, at most 3\.402823e\+38 in size; got"):
        call(op, torch.float32, **{name: value})


@EACH
def test_float64_and_the_largest_of_float32_are_taken(op, name, pair):
    wide = torch.float64 in specs()[op].dtypes
    for dtype, number in ((torch.float32, 3e38), *([(torch.float64, 1e39)] if wide else [])):
        call(op, dtype, **{name: (0.0, number) if pair else number})


@pytest.mark.parametrize("op", [op for op, _, pair in NUMBERS if pair])
def test_a_limit_above_all_numbers_is_none(op):
    found, expected = (call(op, torch.float32, dt_limit=(0.0, most)) for most in (1e39, math.inf))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
