"""HiPPO's matrices, their normal plus low-rank form, and kernels that start from it against dense matrix powers."""

import math

import pytest
import torch

from ssmkernels import diagonal_kernel, dplr_kernel
from ssmzoo.lti.hippo import diagonal, hippo, low_rank, nplr

pytestmark = pytest.mark.mixer("s4", "s4d")

INITS = ["legs", "legt", "fourier"]
SIZES = [2, 4, 6, 64, 128, 256]


def whole(half):
    """Both of each conjugate pair, along the last axis."""
    return torch.cat([half, half.conj()], dim=-1)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("n", SIZES)
def test_the_form_gives_the_dense_matrix_back(init, n):
    A, B = hippo(init, n)
    form = nplr(init, n)
    V, P = whole(form.V), whole(form.P)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(V.mH @ V, torch.eye(n, dtype=V.dtype), **close)
    core = torch.diag(whole(form.Lambda)) - P.mT @ P.conj()
    torch.testing.assert_close(V @ core @ V.mH, A.to(V.dtype), **close)
    torch.testing.assert_close(V @ whole(form.B), B.to(V.dtype), **close)
    assert form.P.shape == ({"legs": 1, "legt": 2, "fourier": 1}[init], n // 2)
    assert (form.Lambda.imag >= 0).all()
    assert (form.Lambda.real <= 0).all()
    assert (form.B.real > 0).all()
    assert form.B.imag.abs().max() < 1e-10


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("n", SIZES)
def test_the_normal_part_is_normal(init, n):
    A, _ = hippo(init, n)
    P = low_rank(init, n)
    normal = A + P.mT @ P
    commutator = normal @ normal.mT - normal.mT @ normal
    assert commutator.norm() <= 1e-14 * n * normal.norm() ** 2
    if n > 2:  # HiPPO itself is not
        assert (A @ A.mT - A.mT @ A).norm() > 1e-3 * A.norm() ** 2


def test_the_matrices_are_those_of_the_papers():
    A, B = hippo("legs", 3)
    root3, root5 = math.sqrt(3), math.sqrt(5)
    expected = [[-1, 0, 0], [-root3, -2, 0], [-root5, -math.sqrt(15), -3]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, root3, root5], dtype=torch.float64))
    A, B = hippo("legt", 2)
    torch.testing.assert_close(A, torch.tensor([[-0.5, root3 / 2], [-root3 / 2, -1.5]], dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([0.5, root3 / 2], dtype=torch.float64))
    A, B = hippo("fourier", 4)
    root2, pi = math.sqrt(2), math.pi
    expected = [[-1, 0, -root2, 0], [0, 0, 0, 0], [-root2, 0, -2, -pi], [0, 0, pi, 0]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, 0, root2, 0], dtype=torch.float64))


@pytest.mark.parametrize("init", INITS)
def test_the_state_remembers_what_its_basis_says(init):
    """Fed with a polynomial or a wave, the state's expansion gives the past back (arXiv 2206.12037)."""
    n, steps, dt = 32, 4000, 1e-3
    A, B = hippo(init, n)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[:n, n] = A * dt, B * dt
    step = torch.linalg.matrix_exp(system)

    def past(s):  # the input s before now
        return torch.cos(2 * math.pi * s) if init == "fourier" else torch.cos(3 * s)

    h = torch.zeros(n, dtype=torch.float64)
    for t in range(steps):
        h = step[:n, :n] @ h + step[:n, n] * past(torch.tensor((steps - t - 0.5) * dt, dtype=torch.float64))
    s = torch.tensor([0.2, 0.5, 0.9, 1.3, 1.7], dtype=torch.float64)
    x = 2 * torch.exp(-s) - 1 if init == "legs" else 1 - s
    if init == "fourier":
        basis = torch.zeros(len(s), n, dtype=torch.float64)
        k = torch.arange(n // 2)
        basis[:, 0::2] = torch.cos(math.pi * k * s[:, None]) * math.sqrt(2)
        basis[:, 1::2] = torch.sin(math.pi * k * s[:, None]) * math.sqrt(2)
        basis[:, 0] = 1
    else:
        basis = torch.stack([torch.special.legendre_polynomial_p(x, k) * math.sqrt(2 * k + 1) for k in range(n)], dim=1)
    seen = basis @ h
    error = (seen - past(s)).abs().max()
    assert error < 0.05, (init, seen, past(s))


@pytest.mark.parametrize("n", [2, 8, 64])
def test_legs_is_the_diagonal_of_hippo(n):
    values = torch.linalg.eigvals(hippo("legs", n)[0] + low_rank("legs", n).mT @ low_rank("legs", n))
    upper = values[values.imag > 0]
    expected = upper[upper.imag.argsort()]
    torch.testing.assert_close(diagonal("legs", n), expected.to(torch.complex64), atol=1e-4, rtol=1e-5)


def test_the_other_diagonals():
    n = torch.arange(4, dtype=torch.float32)
    torch.testing.assert_close(diagonal("lin", 8), torch.complex(torch.full((4,), -0.5), math.pi * n))
    inverse = 8 / math.pi * (8 / (2 * n + 1) - 1)
    torch.testing.assert_close(diagonal("inv", 8), torch.complex(torch.full((4,), -0.5), inverse))
    torch.testing.assert_close(diagonal("real", 3), torch.tensor([-1.0, -2.0, -3.0]))


def taps(A, B, C, dt, length, discretization):
    """C Ā^t B̄ of a dense real system, by doubling: the columns B̄ ... Ā^{m-1} B̄ times Ā^m are the next m."""
    n = len(B)
    eye = torch.eye(n, dtype=A.dtype)
    if discretization == "bilinear":
        step = torch.linalg.solve(eye - A * dt / 2, eye + A * dt / 2)
        columns = torch.linalg.solve(eye - A * dt / 2, B * dt)[:, None]
    else:
        system = torch.zeros(n + 1, n + 1, dtype=A.dtype)
        system[:n, :n], system[:n, n] = A * dt, B * dt
        both = torch.linalg.matrix_exp(system)
        step, columns = both[:n, :n], both[:n, n:]
    while columns.shape[1] < length:
        columns = torch.cat([columns, step @ columns], dim=1)
        step = step @ step
    return C @ columns[:, :length]


@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("n", "length"), [(2, 1), (8, 37), (64, 1024), (256, 4096)])
def test_the_kernel_is_that_of_dense_matrix_powers(init, n, length, discretization):
    torch.manual_seed(0)
    A, B = hippo(init, n)
    C, dt = torch.randn(n, dtype=torch.float64), 0.01
    exact = taps(A, B, C, dt, length, discretization)
    form = nplr(init, n)
    half = [x[None] for x in (form.Lambda, form.P, form.P, form.B, C.to(form.V.dtype) @ form.V)]
    delta = torch.tensor([dt], dtype=torch.float64)
    kernel = dplr_kernel(*half, delta, length, discretization=discretization)[0]
    assert (kernel - exact).abs().max() <= 1e-8 * exact.abs().max()
    single = dplr_kernel(*(x.to(torch.complex64) for x in half), delta.float(), length, discretization=discretization)[
        0
    ]
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
@pytest.mark.parametrize("init", ["legs", "lin", "inv", "real"])
@pytest.mark.parametrize(("n", "length"), [(2, 1), (64, 1024), (256, 4096)])
def test_the_diagonal_kernel_is_that_of_dense_matrix_powers(init, n, length, discretization):
    torch.manual_seed(0)
    Lambda = diagonal(init, n)
    Lambda = Lambda.to(torch.complex128 if Lambda.is_complex() else torch.float64)
    B, C = torch.ones_like(Lambda), torch.randn_like(Lambda)
    dt = 0.01
    if init == "real":
        A, push, read = torch.diag(Lambda), B, C
    else:  # as a real system of [Re h, Im h]
        real, imag = torch.diag(Lambda.real), torch.diag(Lambda.imag)
        A = torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)])
        push, read = torch.cat([B.real, B.imag]), torch.cat([2 * C.real, -2 * C.imag])
    exact = taps(A, push, read, dt, length, discretization)
    delta = torch.tensor([dt], dtype=torch.float64)
    kernel = diagonal_kernel(Lambda[None], B[None], C[None], delta, length, discretization=discretization)[0]
    assert (kernel - exact).abs().max() <= 1e-8 * exact.abs().max()
    single = [x.to(torch.complex64 if x.is_complex() else torch.float32)[None] for x in (Lambda, B, C)]
    kernel = diagonal_kernel(*single, delta.float(), length, discretization=discretization)[0]
    assert (kernel - exact).abs().max() <= 1e-4 * exact.abs().max()
