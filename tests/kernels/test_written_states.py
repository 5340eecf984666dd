"""States that a step cannot write into are refused by name, whichever implementation would run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmkernels.check.spec import spec_of
from ssmkernels.core.dispatch import explain
from ssmkernels.core.names import OPS
from ssmkernels.core.written import check_written

STATES = [(op, name) for op in OPS for name in spec_of(op).mutates]


def _negated(state: Tensor) -> Tensor:
    return torch.complex(state, -state).conj().imag


def _expanded(state: Tensor) -> Tensor:
    return state[:1].expand_as(state)


def _wanting_a_gradient(state: Tensor) -> Tensor:
    return state.clone().requires_grad_()


def _cases(op: str) -> list[str | None]:
    arguments = spec_of(op).inputs(spec_of(op).case({}), torch.float32, "cpu", 0)
    return [None, *explain(spec_of(op).function(), **arguments).able]


@pytest.mark.parametrize("make", [_negated, _expanded, _wanting_a_gradient])
@pytest.mark.parametrize(
    ("op", "name", "implementation"), [(op, name, how) for op, name in STATES for how in _cases(op)]
)
def test_it_is_refused_by_name(op, name, implementation, make):
    arguments = spec_of(op).inputs(spec_of(op).case({}), torch.float32, "cpu", 0)
    arguments[name] = make(arguments[name])
    before = arguments[name].detach().clone()
    with pytest.raises(ValueError, match=f"{op}: `{name}` is written in place"):
        spec_of(op).function()(**arguments, implementation=implementation)
    assert torch.equal(arguments[name], before)


def test_a_conjugated_state_is_refused():
    with pytest.raises(ValueError, match="negated or conjugated view"):
        check_written("op", "state", torch.zeros(2, 3, dtype=torch.complex64).conj())


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((2, 3), (3, 1), False),
        ((2, 3), (1, 2), False),
        ((2, 3), (100, 7), False),
        ((2, 3), (3, 2), False),  # 0 2 4 and 3 5 7
        ((2, 3), (2, 1), True),  # windows: 0 1 2 and 2 3 4
        ((2, 3), (0, 1), True),
        ((1, 3), (0, 1), False),
        ((0, 3), (0, 0), False),
    ],
)
def test_elements_that_share_memory(shape, strides, overlaps):
    state = torch.zeros(1000).as_strided(shape, strides)
    if not overlaps:
        check_written("op", "state", state)
        return
    with pytest.raises(ValueError, match="must not share memory"):
        check_written("op", "state", state)


def test_a_leaf_that_wants_a_gradient_may_be_written_where_none_is_recorded():
    with torch.no_grad():
        check_written("op", "state", torch.zeros(3, requires_grad=True))
    check_written("op", "state", torch.zeros(3, requires_grad=True).clone())
