"""The gates of the real-gated linear recurrent unit: in complex arithmetic, at decays close to 1, and its errors."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import rglru_gates
from ssmkernels.ops.rglru_gates.reference import capped_root


def arguments(**changes):
    generator = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(2, 5, 3, 4, generator=generator),
        "gates": torch.randn(2, 5, 3, 8, generator=generator),
        "log_decay": -torch.rand(3, 4, generator=generator),
        "first": torch.zeros(2, 5, dtype=torch.int32),
    }
    return given | changes


def test_the_state_keeps_the_variance_of_its_input():
    """a = sin φ and √(1 - a²) = cos φ: both are parts of one number of size 1."""
    given = arguments()
    given["first"][:, 2] = 1
    a, b = rglru_gates(**given)
    open_gate, input_gate = torch.sigmoid(given["gates"].double()).chunk(2, dim=-1)
    factor = b.double() / (input_gate * given["x"])
    size = torch.complex(a.double(), factor).abs()
    after = [t for t in range(5) if t != 2]
    torch.testing.assert_close(size[:, after], torch.ones(2, 4, 3, 4, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(factor[:, 2], torch.ones_like(factor[:, 2]), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        a.double().log() / open_gate, given["log_decay"].double().expand_as(a), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_decays_close_to_one(implementation):
    """√(1 - a²) ≈ √(-2 log a), which float32's a alone could not tell."""
    given = arguments(x=torch.ones(2, 5, 3, 4), gates=torch.full((2, 5, 3, 8), 20.0), first=None)
    given["log_decay"] = torch.full((3, 4), -1e-7)
    a, b = rglru_gates(**given, implementation=implementation)
    torch.testing.assert_close(b, torch.full_like(b, 2e-7**0.5), rtol=1e-6, atol=0)
    assert (a <= 1).all()


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_the_derivative_of_the_root_is_capped(implementation):
    """With open gates and x = 1, db/dlog_decay = -2 a² times the root's derivative by 1 - a²."""
    decays = torch.tensor([[0.0, -1e-12, -0.5]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1, 1, 3, dtype=torch.float64)
    _, b = rglru_gates(ones, 60 * ones.repeat(1, 1, 1, 2), decays, implementation=implementation)
    (found,) = torch.autograd.grad(b.sum(), decays)
    square = torch.exp(2 * decays.detach())
    slope = torch.tensor([1000.0, 1000.0, 0.5 / (1 - torch.exp(torch.tensor(-1.0).double())).sqrt()]).double()
    torch.testing.assert_close(found, -2 * square * slope)


def test_derivatives_of_the_root():
    x = torch.tensor([0.0, 1e-12, 0.25], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(capped_root(x).sum(), x, create_graph=True)
    torch.testing.assert_close(slope, torch.tensor([1000.0, 1000.0, 1.0], dtype=torch.float64))
    (second,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(second, torch.tensor([0.0, 0.0, -2.0], dtype=torch.float64))
    _, tangent = torch.func.jvp(capped_root, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, slope.detach())
    mapped = torch.func.vmap(torch.func.grad(capped_root))(x.detach())
    torch.testing.assert_close(mapped, slope.detach())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 5, 12)}, ValueError, r"`x` must have shape \(b l h p\)"),
        ({"gates": torch.ones(2, 5, 3, 7)}, ValueError, r"`gates` must have shape \(b l h 2p\)"),
        ({"gates": torch.ones(2, 5, 3, 8).double()}, TypeError, "`gates` must"),
        ({"log_decay": torch.ones(12)}, ValueError, r"`log_decay` must have shape \(h p\)"),
        ({"first": torch.zeros(2, 5, dtype=torch.bool)}, TypeError, "`first` must be int32"),
        ({"first": torch.zeros(5, dtype=torch.int32)}, ValueError, r"`first` must have shape \(b l\)"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        rglru_gates(**arguments(**changes))
