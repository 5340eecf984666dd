"""The linear recurrence against its closed form, where it must be exact, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import OPS, linear_recurrence, linear_recurrence_step

IMPLEMENTATIONS = [name for name in ("reference", "cpu") if name in OPS["linear_recurrence"].names]


def closed_form(a, b):
    """h_t = Σ_{j ≤ t} (a_{j+1} … a_t) b_j, by a matrix of products for each channel."""
    length = b.shape[1]
    h = torch.zeros_like(b)
    for t in range(length):
        for j in range(t + 1):
            h[:, t] = h[:, t] + torch.prod(a[:, j + 1 : t + 1], dim=1) * b[:, j]
    return h


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_closed_form(implementation, dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 7, 5, dtype=dtype) for _ in range(2))
    h = linear_recurrence(a, b, implementation=implementation)
    torch.testing.assert_close(h, closed_form(a, b))
    logarithms = torch.log(a.abs()) if dtype == torch.float64 else torch.log(a)
    same = linear_recurrence(logarithms, b, log_a=True, implementation=implementation)
    torch.testing.assert_close(same, closed_form(a.abs() if dtype == torch.float64 else a, b))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_exact_where_a_is_0_or_1_and_finite_above(implementation):
    b = torch.arange(1.0, 13.0).reshape(1, 12, 1)
    ones = linear_recurrence(torch.ones(1), b, implementation=implementation)
    assert torch.equal(ones, b.cumsum(1))
    for log_a, zero in ((False, 0.0), (True, float("-inf"))):
        decay = torch.full((1, 12, 1), 0.0 if log_a else 1.0)
        decay[0, 5] = zero  # a reset: what came before is gone
        h = linear_recurrence(
            decay, b, log_a=log_a, initial_state=torch.full((1, 1), 1e30), implementation=implementation
        )
        assert torch.equal(h[:, 5:], b[:, 5:].cumsum(1))
    powers = linear_recurrence(torch.full((1,), 2.0), torch.ones(1, 100, 1), implementation=implementation)
    assert torch.equal(powers[0, :20, 0], 2.0 ** torch.arange(1, 21) - 1)


def test_token_by_token_is_the_same():
    torch.manual_seed(0)
    a, b = torch.rand(2, 9, 5), torch.randn(2, 9, 5)
    whole, last = linear_recurrence(a, b, return_final_state=True)
    state = torch.zeros(2, 5)
    steps = [linear_recurrence_step(state, a[:, t], b[:, t]) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_the_other_way_round_in_time():
    """For layers of two directions: flipped inputs give g_t = b_t + a_t g_{t+1}."""
    torch.manual_seed(0)
    a, b = torch.rand(1, 6, 3, dtype=torch.float64), torch.randn(1, 6, 3, dtype=torch.float64)
    g = linear_recurrence(a.flip(1), b.flip(1)).flip(1)
    torch.testing.assert_close(g[:, :-1], b[:, :-1] + a[:, :-1] * g[:, 1:])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.rand(2, 4, 3)}, ValueError, r"`a` must have shape"),
        ({"a": torch.rand(2)}, ValueError, r"`a` must have shape"),
        ({"a": torch.rand(3, dtype=torch.complex64)}, TypeError, r"`a` must be float32"),
        ({"a": torch.rand(3, dtype=torch.float64)}, TypeError, r"`a` must be float32; got float64"),
        ({"b": torch.ones(2, 5, 3, dtype=torch.int64)}, TypeError, r"`b` must be"),
        ({"initial_state": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, r"`initial_state` must be float32"),
        ({"initial_state": torch.zeros(1, 3)}, ValueError, r"`initial_state` must have shape"),
        ({"log_a": 1}, TypeError, r"`log_a` must be a bool"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, r"`cu_seqlens`"),
    ],
)
def test_refusals(changes, error, message):
    arguments = {"a": torch.rand(2, 5, 3), "b": torch.randn(2, 5, 3)} | changes
    with pytest.raises(error, match="linear_recurrence: .*" + message):
        linear_recurrence(**arguments)
