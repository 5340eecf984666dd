"""The gated product: by complex arithmetic, on parts of a projection, at extreme gates, and its errors."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import swiglu

BOTH = pytest.mark.parametrize("implementation", ["cpu", "reference"])


@BOTH
def test_by_halves_of_tanh(implementation):
    """σ(x) = (1 + tanh(x/2)) / 2."""
    gate, up = torch.randn(2, 3, 37, dtype=torch.float64)
    u = 0.7 * gate
    expected = u * (1 + torch.tanh(u / 2)) / 2 * up
    torch.testing.assert_close(swiglu(gate, up, scale=0.7, implementation=implementation), expected)


@BOTH
def test_parts_of_a_projection_are_read_where_they_lie(implementation):
    wide = torch.randn(2, 5, 2 * 21, requires_grad=True)
    gate, up = wide.chunk(2, dim=-1)
    found = torch.autograd.grad(swiglu(gate, up, implementation=implementation).square().sum(), wide)
    apart = [t.detach().contiguous().requires_grad_() for t in (gate, up)]
    expected = torch.autograd.grad(swiglu(*apart, implementation=implementation).square().sum(), apart)
    torch.testing.assert_close(found[0], torch.cat(expected, dim=-1))


@BOTH
def test_extreme_gates(implementation):
    """An open gate lets everything through, a shut one nothing, and neither has a gradient that is no number."""
    gate = torch.tensor([200.0, -200.0, 1e30, -1e30, 0.0]).requires_grad_()
    up = torch.full((5,), 3.0, requires_grad=True)
    y = swiglu(gate, up, implementation=implementation)
    torch.testing.assert_close(y.detach(), torch.tensor([600.0, 0.0, 3e30, 0.0, 0.0]))
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(dgate, torch.tensor([3.0, 0.0, 3.0, 0.0, 1.5]))
    torch.testing.assert_close(dup, torch.tensor([200.0, 0.0, 1e30, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("gate", "up", "options", "error", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 3), {}, ValueError, r"`up` must have shape \(\.\.\. d\)"),
        (torch.ones(2, 4), torch.ones(2, 4).double(), {}, TypeError, "`up` must"),
        (torch.ones(2, 4), 1.0, {}, TypeError, "`up` must"),
        (torch.ones(2, 4), torch.ones(2, 4), {"scale": "half"}, TypeError, "`scale` must"),
    ],
)
def test_errors(gate, up, options, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate, up, **options)
