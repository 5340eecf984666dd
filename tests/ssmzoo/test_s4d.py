"""S4D's initialisations against the HiPPO matrix, its kernel against dense matrix powers, and its training options."""

import math

import pytest
import torch

import ssmzoo
from ssmzoo.mixers.s4d import diagonal


@pytest.mark.parametrize("n", [2, 8, 64])
def test_legs_is_the_diagonal_of_hippo(n):
    # HiPPO-LegS (arXiv 2008.07669, equation 3) plus its rank-one term P Pᵀ is normal (S4, arXiv 2111.00396, theorem 1).
    index = torch.arange(n, dtype=torch.float64)
    root = torch.sqrt(2 * index + 1)
    hippo = -(torch.tril(root[:, None] * root, -1) + torch.diag(index + 1))
    P = torch.sqrt(index + 0.5)
    values = torch.linalg.eigvals(hippo + P[:, None] * P)
    upper = values[values.imag > 0]
    expected = upper[upper.imag.argsort()]
    torch.testing.assert_close(diagonal("legs", n), expected.to(torch.complex64), atol=1e-4, rtol=1e-5)


def test_the_other_diagonals():
    n = torch.arange(4, dtype=torch.float32)
    torch.testing.assert_close(diagonal("lin", 8), torch.complex(torch.full((4,), -0.5), math.pi * n))
    inverse = 8 / math.pi * (8 / (2 * n + 1) - 1)
    torch.testing.assert_close(diagonal("inv", 8), torch.complex(torch.full((4,), -0.5), inverse))
    torch.testing.assert_close(diagonal("real", 3), torch.tensor([-1.0, -2.0, -3.0]))


@torch.no_grad()
@pytest.mark.parametrize("init", ["legs", "lin", "inv", "real"])
def test_the_response_is_that_of_the_dense_system(init):
    # x' = A x + B u held constant over each step, by the matrix exponential of the augmented system.
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer("s4d", 2, d_state=6, init=init, dt_min=0.05, dt_max=0.2).double()
    A, B, C, dt = mixer._system()
    n = A.shape[1]
    u = torch.randn(1, 12, 2, dtype=torch.float64)
    for d in range(2):
        system = torch.zeros(n + 1, n + 1, dtype=A.dtype)
        system[:n, :n], system[:n, n] = torch.diag(A[d]), B[d]
        step = torch.linalg.matrix_exp(system * dt[d])
        x, response = torch.zeros(n, dtype=A.dtype), []
        for t in range(12):
            x = step[:n, :n] @ x + step[:n, n] * u[0, t, d]
            y = (C[d] * x).sum()
            response.append((2 * y.real if y.is_complex() else y) + mixer.D[d] * u[0, t, d])
        _, after = mixer._with_state(u, torch.zeros(1, *A.shape, dtype=A.dtype), *_discrete(mixer))
        torch.testing.assert_close(after[0, d], x, atol=1e-10, rtol=1e-10)
        kernel, _ = mixer._kernel(12, A, B, C, dt)
        full = torch.stack([(kernel[d, : t + 1].flip(0) * u[0, : t + 1, d]).sum() for t in range(12)])
        torch.testing.assert_close(full + mixer.D[d] * u[0, :, d], torch.stack(response), atol=1e-10, rtol=1e-10)


def _discrete(mixer):
    from ssmkernels import discretize_diagonal

    A, B, C, dt = mixer._system()
    return (*discretize_diagonal(A, B, dt), C)


def test_the_system_trains_at_its_own_rate_without_decay():
    mixer = ssmzoo.build_mixer("s4d", 8, lr=0.002)
    assert set(mixer.learning_rates) == {"log_dt", "A_log", "A_imag", "B"}
    assert set(mixer.learning_rates.values()) == {0.002}
    assert set(mixer.no_weight_decay) == set(mixer.learning_rates)
    assert "C" not in mixer.no_weight_decay


def test_bidirectional_sees_ahead():
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer("s4d", 4, d_state=4, bidirectional=True)
    x = torch.randn(1, 9, 4)
    changed = x.clone()
    changed[:, -1] += 1
    assert not mixer.causal
    assert not torch.allclose(mixer(x)[:, 0], mixer(changed)[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 5}, "`d_state` must be positive, and even unless init='real'; got 5"),
        ({"d_state": 0}, "`d_state` must be positive"),
        ({"dt_min": 0.2}, "`dt_min` <= `dt_max` must hold"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        ssmzoo.build_mixer("s4d", 4, **options)
