from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ssmkernels.core.library import opaque

serial = itertools.count()  # operators cannot be registered twice in a process


def scaled(x: Tensor, y: Tensor | None, factor: float) -> Tensor:
    total = x.sum()
    for _ in range(int(total.abs()) % 3):  # what no compiler can trace
        x = x * factor
    return x if y is None else x + y


def itself(x: Tensor) -> Tensor:
    return x


def views(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x[:1], x, x


def added(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the first output is at once that of x and of y."""
    return x + y, x * 2


def conjugate(x: Tensor, y: Tensor) -> Tensor:
    """Complex products of what PyTorch only marks as conjugate, forwards and, by its gradients, backwards."""
    z = torch.view_as_complex(x)
    return torch.view_as_real(z.conj() * torch.fft.ifft(torch.fft.fft(z) * z.conj())).sum(-1) * y


FAKES = {
    conjugate: lambda x, y: torch.empty_like(y),
    scaled: lambda x, y, factor: torch.empty_like(x),
    itself: torch.empty_like,
    views: lambda x: (x.new_empty(1), torch.empty_like(x), torch.empty_like(x)),
    added: lambda x, y: (torch.empty_like(x), torch.empty_like(x)),
}
CASES = {
    "a loop over data": (scaled, {"x": torch.full((3,), 0.7), "y": torch.ones(3), "factor": 2.0}),
    "an input left out": (scaled, {"x": torch.full((3,), 0.7), "y": None, "factor": 2.0}),
    "the input itself": (itself, {"x": torch.ones(3)}),
    "the input in parts, twice": (views, {"x": torch.ones(3)}),
    "conjugates put off": (conjugate, {"x": torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 6.0]]), "y": torch.ones(3)}),
    "a gradient for two": (added, {"x": torch.ones(3), "y": torch.ones(3)}),
}
EVERY = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def call(case):
    function, arguments = CASES[case]
    return opaque(f"test_{function.__name__}_{next(serial)}", function, FAKES[function]), arguments


@EVERY
def test_one_node_with_the_same_results(call, assert_compiles):
    function, arguments = call
    assert_compiles(lambda **given: function(*given.values()), **arguments)


@EVERY
def test_opcheck(call, opcheck):
    function, arguments = call
    opcheck(function.operator, arguments)


def test_eager_calls_go_straight_to_the_function():
    x = torch.ones(3)
    assert opaque(f"test_itself_{next(serial)}", itself, FAKES[itself])(x) is x


def test_only_wanted_gradients_are_computed():
    function = opaque(f"test_added_{next(serial)}", added, FAKES[added])
    x, y = torch.ones(3, requires_grad=True), torch.ones(3)
    first, _ = function.operator(x, y)
    first.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    assert y.grad is None
