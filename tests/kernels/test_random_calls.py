"""Random calls of every op: valid ones are right, invalid ones name the argument at fault before anything runs."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmkernels import OPS, explain
from ssmkernels.check.spec import specs
from ssmkernels.testing import check

SPECS = specs()
EVERY = pytest.mark.parametrize("op", sorted(SPECS))
QUIET = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def rows(draw, spec):
    """A row made of up to three of the spec's, with one size changed at will."""
    near = [row for row in spec.rows if row.get("layout") != "far"]
    row = {k: v for one in draw(st.lists(st.sampled_from(near), max_size=3)) for k, v in one.items()}
    sizes = [key for key, value in spec.base.items() if type(value) is int]
    if sizes and draw(st.booleans()):
        row[draw(st.sampled_from(sizes))] = draw(st.integers(1, 9))
    return row


def refusal(spec, arguments):
    """The error that a call raises before anything runs, which must name an argument of the function; or None."""
    try:
        explain(spec.function(), **arguments)
    except (ValueError, TypeError) as error:
        message = str(error)
        names = set(inspect.signature(spec.function()).parameters)
        assert message.startswith(f"{spec.op}: "), message
        found = {word for pair in re.findall(r"`(\w+)`|unknown (\w+): ", message) for word in pair}
        assert names & found, f"no argument named: {message}"
        return error
    return None


@EVERY
@settings(max_examples=15, **QUIET)
@given(data=st.data())
def test_a_call_is_right_or_refused(op, data):
    spec = SPECS[op]
    row, dtype = data.draw(rows(spec)), data.draw(st.sampled_from(DTYPES))
    if refusal(spec, spec.inputs(spec.case(row), dtype, "cpu", 0)) is None:
        for name in OPS[op].names:
            if name != "reference" and not OPS[op].why_not(name):
                assert not check(op, name, cases=[row], dtypes=[dtype], raises=False, quick=True).failures


def changed(draw, value):
    """What should not stand there in place of a value."""
    if not isinstance(value, torch.Tensor):
        return draw(st.sampled_from(["text", -5, 2.5, [1], (1,), torch.zeros(2), object(), None, float("nan")]))
    axis = draw(st.integers(0, max(value.ndim - 1, 0)))
    ways = [
        lambda: value.unsqueeze(axis),
        lambda: value.flatten(),
        lambda: value.new_zeros([n + (i == axis) for i, n in enumerate(value.shape)]),
        lambda: value.narrow(axis, 0, value.shape[axis] - 1) if value.ndim and value.shape[axis] else value[None],
        lambda: value.to(
            draw(st.sampled_from([torch.int64, torch.bool, torch.float64, torch.float16, torch.complex64]))
        ),
        lambda: value.to("meta"),
        lambda: value.tolist(),
        lambda: draw(st.sampled_from(["text", 3, 2.5, None, object()])),
    ]
    return draw(st.sampled_from(ways))()


@EVERY
@settings(max_examples=100, **QUIET)
@given(data=st.data())
def test_a_wrong_argument_is_refused_or_harmless(op, data):
    spec = SPECS[op]
    arguments = spec.inputs(spec.case(data.draw(rows(spec))), torch.float32, "cpu", 0)
    name = data.draw(st.sampled_from(sorted(arguments)))
    arguments[name] = changed(data.draw, arguments[name])
    if refusal(spec, arguments) is None:
        spec.function()(**arguments)
