from __future__ import annotations

import functools

import pytest
import torch

from ssmkernels import OPS, diagonal_kernel, discretize_diagonal, explain, native
from ssmkernels.ops.diagonal_kernel import tiled

REFERENCE = functools.partial(diagonal_kernel, implementation="reference")
TILED = functools.partial(diagonal_kernel, implementation="tiled")
NATIVE = functools.partial(diagonal_kernel, implementation="cpu")
NEEDS_NATIVE = pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
EITHER = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(REFERENCE, id="reference"),
        pytest.param(TILED, id="tiled"),
        pytest.param(NATIVE, id="cpu", marks=NEEDS_NATIVE),
    ],
)
FAST = pytest.mark.parametrize(
    "kernel", [pytest.param(TILED, id="tiled"), pytest.param(NATIVE, id="cpu", marks=NEEDS_NATIVE)]
)
RULES = pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
EVERY_RULE = pytest.mark.parametrize("discretization", ["zoh", "bilinear", "dss"])
COMPLEX = pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])


@pytest.fixture
def arguments(randn):
    def make(dtype=torch.float64, *, d=3, n=4, length=17, complex=True, discretization="zoh"):
        A, B, C = (randn(d, n, dtype=torch.complex128 if complex else torch.float64) for _ in range(3))
        A = torch.complex(-A.real.abs(), 4 * A.imag) if complex else -A.abs()
        kind = torch.promote_types(dtype, torch.complex64) if complex else dtype
        dt = torch.linspace(0.05, 0.5, d, dtype=torch.float64).to(dtype)
        made = {"A": A.to(kind), "B": B.to(kind), "C": C.to(kind), "dt": dt}
        return made | {"length": length, "discretization": discretization}

    return make


def conjugates(x):
    return torch.cat([x, x.conj().resolve_conj()], dim=-1) if x.is_complex() else x


def by_matrices(A, B, C, dt, length, discretization):
    """Dense matrices, the conjugates among their entries; discretised by exponential and inverse."""
    A, B, C = conjugates(A), conjugates(B), conjugates(C)
    d, n = A.shape
    dense, eye = torch.diag_embed(A), torch.eye(n, dtype=A.dtype)
    scaled = dt[:, None, None] * dense
    if discretization == "zoh":  # exp of [[ΔA, ΔB], [0, 0]] is [[Ā, B̄], [0, 1]]
        system = torch.cat([scaled, dt[:, None, None] * B[..., None]], dim=-1)
        both = torch.linalg.matrix_exp(torch.cat([system, torch.zeros(d, 1, n + 1, dtype=A.dtype)], dim=1))
        A_bar, B_bar = both[:, :n, :n], both[:, :n, n]
    else:
        inverse = torch.linalg.inv(eye - scaled / 2)
        A_bar, B_bar = inverse @ (eye + scaled / 2), dt[:, None] * (inverse @ B[..., None])[..., 0]
    powers = [torch.linalg.matrix_power(A_bar, t) for t in range(length)]
    taps = [torch.einsum("dn,dnm,dm->d", C, power, B_bar) for power in powers]
    taps = torch.stack(taps, dim=-1)
    return taps.real if taps.is_complex() else taps


@EITHER
@RULES
@COMPLEX
def test_it_is_powers_of_matrices(kernel, discretization, complex, arguments, run, assert_same):
    made = arguments(complex=complex, discretization=discretization)
    assert_same(run(kernel, **made), run(by_matrices, **made))


@FAST
@EVERY_RULE
@COMPLEX
@pytest.mark.parametrize("length", [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 131])
def test_it_is_the_reference(kernel, discretization, complex, length, arguments, run, assert_same):
    made = arguments(complex=complex, discretization=discretization, length=length)
    assert_same(run(kernel, **made), run(REFERENCE, **made))


@EITHER
@COMPLEX
def test_dss_is_a_softmax_over_time(kernel, complex, arguments):
    """Whatever the signs of Re A, which is why the published form treats what grows by itself."""
    made = arguments(complex=complex, length=31)
    made["A"][:, ::2] *= -1
    made["dt"] = made["dt"] * 4
    A, B, C, dt = (made[name] for name in ("A", "B", "C", "dt"))
    exponents = dt[:, None, None] * A[..., None] * torch.arange(31)
    powers = torch.exp(exponents - exponents.real.amax(-1, keepdim=True))
    exact = (C * B / A)[..., None] * powers / powers.sum(-1, keepdim=True)
    exact = 2 * exact.sum(1).real if complex else exact.sum(1)
    torch.testing.assert_close(kernel(**made | {"discretization": "dss"}), exact, rtol=1e-5, atol=1e-6)


@EITHER
@COMPLEX
def test_dss_neither_overflows_nor_divides_by_zero(kernel, complex, arguments, run):
    made = arguments(torch.float32, complex=complex, discretization="dss", d=1, n=4, length=40)
    made["A"][0] = torch.tensor([0.0, 1e3, -1e3, 0.0])
    if complex:
        made["A"][0, 3] = 2j * torch.pi / (made["dt"][0] * 40)  # a whole turn
    assert all(r.isfinite().all() for r in run(kernel, **made).values())


@COMPLEX
def test_dss_follows_growth_back_from_the_last_tap(complex, arguments):
    """The recurrence's B̄ has what the kernel does not compute by powers of a growing number."""
    made = arguments(complex=complex, length=9, discretization="dss")
    made["A"] = -made["A"]
    A_bar, B_bar = discretize_diagonal(made["A"], made["B"], made["dt"], discretization="dss", length=9)
    taps = torch.stack([(made["C"] * A_bar**t * B_bar).sum(-1) for t in range(9)], dim=-1)
    torch.testing.assert_close(REFERENCE(**made), 2 * taps.real if complex else taps)


@pytest.mark.parametrize(
    ("length", "error", "match"),
    [
        (None, TypeError, "discretize_diagonal: `length` must be an int; got NoneType"),
        (-1, ValueError, "discretize_diagonal: `length` must be at least 0; got -1"),
    ],
)
def test_dss_wants_a_length(length, error, match, randn):
    with pytest.raises(error, match=match):
        discretize_diagonal(randn(3, 4), randn(3, 4), randn(3), discretization="dss", length=length)


@pytest.mark.parametrize("size", [{"d": 0}, {"n": 0}, {"d": 1, "n": 1}], ids=str)
def test_small_sizes(size, arguments, run, assert_same):
    made = arguments(**size)
    assert_same(run(TILED, **made), run(REFERENCE, **made))
    assert TILED(**made).shape == (made["A"].shape[0], 17)


def test_real_maps_beside_a_complex_A(arguments, run, assert_same):
    made = arguments()
    made |= {"B": made["B"].real.clone(), "C": made["C"].real.clone()}
    assert_same(run(TILED, **made), run(REFERENCE, **made))


@FAST
def test_float32_accuracy_at_a_long_range(kernel, arguments):
    """At S4D-Lin's A_n = -1/2 + iπn, the last of n = 64 turns through 3000 radians in 16384 steps of 1e-3."""
    n = torch.arange(64, dtype=torch.float64)
    A = torch.complex(torch.full_like(n, -0.5), torch.pi * n).expand(2, 64).to(torch.complex64)
    ones, dt = torch.ones_like(A), torch.tensor([1e-3, 1e-1])
    exact = TILED(A.to(torch.complex128), ones, ones, dt.double(), 16384)
    found = kernel(A, ones, ones, dt, 16384)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@FAST
@COMPLEX
def test_high_powers_and_their_gradients(kernel, complex):
    """K_t = 2 Re exp(ΔA t) at B̄ = 1 in float64, through several blocks and more than one span of them."""
    A = torch.complex(torch.tensor([[-1e-4]]), torch.tensor([[3.0]])).to(torch.complex128)
    A = (A if complex else A.real.clone()).requires_grad_()
    dt, one, length = torch.tensor([0.3], dtype=torch.float64), torch.ones_like(A), 12345
    gain = (torch.exp(dt * A) - 1) / A
    t = torch.arange(length, dtype=torch.float64)
    exact = torch.exp(dt * A * t)
    exact = 2 * exact.real if complex else exact
    weights = torch.cos(t)
    found = kernel(A, one / gain, one, dt, length)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(K, A, weights[None], retain_graph=True)[0] for K in (found, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)


@NEEDS_NATIVE
@COMPLEX
@pytest.mark.parametrize("length", [5, 100, 7000])
def test_native_bits_do_not_depend_on_threads(complex, length, arguments, run, monkeypatch):
    monkeypatch.setattr(native, "SMALL", 0)
    made = arguments(torch.float32, complex=complex, d=2, n=5, length=length)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(NATIVE, **made))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


INTERPRETED = """
from ssmkernels import OPS
from ssmkernels.testing import check
import torch
rows = [dict(length=0), dict(length=65), dict(length=1), dict(n=17, complex=False), dict(length=1100, d=1, n=1)]
rows += [dict(discretization="dss", decay=-1.0), dict(layout="strided"), dict(real_maps=True)]
for cases, dtype in ((rows, torch.float32), (rows[1:4], torch.float64)):
    report = check("diagonal_kernel", "triton", cases=cases, dtypes=[dtype], quick=True)
    assert not report.skipped, report
arguments = torch.full((2, 3), -0.5 + 1j), *torch.randn(2, 2, 3, dtype=torch.complex64), torch.ones(2), 4, "dss"
arguments = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
torch.library.opcheck(OPS["diagonal_kernel"].implementation("triton").function.operator, tuple(arguments))
"""


@pytest.mark.slow
def test_triton_in_the_interpreter(interpret):
    interpret(INTERPRETED)


@NEEDS_NATIVE
def test_native_is_the_first_choice_on_the_CPU(arguments):
    assert explain("diagonal_kernel", **arguments()).chosen == "cpu"
    assert explain("diagonal_kernel", **arguments(n=0)).reasons["cpu"] == "no channels or no states"


def test_tiled_never_holds_all_powers(arguments, monkeypatch):
    counts = []
    powers = tiled.power_table
    monkeypatch.setattr(tiled, "power_table", lambda a, count: counts.append(count) or powers(a, count))
    TILED(**arguments(length=5000))
    assert len(counts) == 2
    assert sum(counts) <= 4 * 5000**0.5


@EITHER
@RULES
@COMPLEX
def test_decay_to_nothing_has_finite_gradients(kernel, discretization, complex, arguments, run):
    """Ā is 0 by underflow (zoh) or exactly, at ΔA = -2 (bilinear)."""
    made = arguments(complex=complex, discretization=discretization)
    made["A"][:], made["dt"][:] = (-2e4, 0.5) if discretization == "zoh" else (-4, 0.5)
    results = run(kernel, **made)
    assert all(r.isfinite().all() for r in results.values())
    assert (results["output 0"][:, 1:] == 0).all()
    assert results["output 0"][:, 0].abs().min() > 0


@RULES
@COMPLEX
@pytest.mark.parametrize("A", [0.0, 1e-30, -1e-8, -1e-3, -0.999, -1.001, -30.0])
def test_the_input_map_and_its_gradient_around_zero(discretization, complex, A, run):
    """In float32 as exact as in float64, through the limit B̄ = ΔB at A = 0."""

    def B_bar(A, dt):
        return discretize_diagonal(A, torch.ones_like(A), dt, discretization=discretization)[1]

    made = {"A": torch.full((1, 1), A), "dt": torch.full((1,), 0.5)}
    made["A"] = made["A"].to(torch.complex64) * (0.6 + 0.8j) if complex else made["A"]
    exact = run(B_bar, A=made["A"].to(torch.complex128 if complex else torch.float64), dt=made["dt"].double())
    roundings = 8 * max(1, 0.5 * abs(A))  # exp(z) inherits |z| times the rounding of z
    for name, found in run(B_bar, **made).items():
        rtol = roundings * torch.finfo(torch.float32).eps
        torch.testing.assert_close(found.to(exact[name].dtype), exact[name], rtol=rtol, atol=0)


def test_zoh_at_zero(run):
    A = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    B, dt = torch.full_like(A, 3), torch.full_like(A[0], 0.5)
    A_bar, B_bar = discretize_diagonal(A, B, dt)
    assert (A_bar.item(), B_bar.item()) == (1, 1.5)
    (gradient,) = torch.autograd.grad(B_bar.sum(), A)
    assert gradient.item() == pytest.approx(3 * 0.5**2 / 2)  # of Δ (1 + ΔA/2 + ...) B


@EVERY_RULE
@COMPLEX
def test_discretize_gradcheck(discretization, complex, arguments):
    made = arguments(complex=complex)
    made["A"][:, 0] *= -1
    values = [made[name].requires_grad_() for name in ("A", "B", "dt")]
    torch.autograd.gradcheck(lambda *v: discretize_diagonal(*v, discretization=discretization, length=7), values)


@EITHER
@COMPLEX
@pytest.mark.parametrize("discretization", ["zoh", "dss"])
def test_gradcheck(kernel, complex, discretization, arguments):
    made = arguments(complex=complex, d=2, n=2, length=6)
    made["A"][:, 0] *= -1
    values = [made[name].requires_grad_() for name in ("A", "B", "C", "dt")]
    torch.autograd.gradcheck(lambda *v: kernel(*v, 6, discretization=discretization), values)


@EITHER
@EVERY_RULE
@COMPLEX
def test_the_kernel_is_what_the_step_does(kernel, discretization, complex, arguments):
    made = arguments(complex=complex, discretization=discretization)
    A_bar, B_bar = discretize_diagonal(made["A"], made["B"], made["dt"], discretization=discretization, length=17)
    h, y = torch.zeros_like(A_bar), []
    for t in range(17):
        h = A_bar * h + B_bar * (t == 0)
        y.append((made["C"] * h).sum(-1))
    y = torch.stack(y, dim=-1)
    torch.testing.assert_close(kernel(**made), 2 * y.real if complex else y)


@EITHER
def test_any_strides(kernel, arguments, run, assert_same, spread):
    made = arguments()
    assert_same(run(kernel, **spread(made)), run(kernel, **made))


@EITHER
def test_twice_the_same_bits(kernel, arguments, assert_repeats):
    assert_repeats(kernel, **arguments(torch.float32, length=131))


@EITHER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(kernel, dtype, arguments):
    made = arguments(dtype, complex=False)
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    assert kernel(**made).dtype == torch.float32
    assert torch.equal(kernel(**made), kernel(**wide))


@EITHER
@COMPLEX
@pytest.mark.parametrize("discretization", ["zoh", "dss"])
def test_compiles(kernel, complex, discretization, arguments, assert_compiles):
    assert_compiles(kernel, **arguments(torch.float32, complex=complex, discretization=discretization))


@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=NEEDS_NATIVE), "tiled", "reference"])
@pytest.mark.parametrize("variant", [{}, {"complex": False}, {"length": 0}, {"discretization": "dss"}], ids=str)
def test_opcheck(implementation, variant, arguments, opcheck):
    operator = OPS["diagonal_kernel"].implementation(implementation).function.operator
    opcheck(operator, arguments(**variant))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"A": torch.zeros(3)}, ValueError, r"`A` must have shape \(d n\); got \(3,\)"),
        ({"A": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "`A` must be .*; got int64"),
        ({"A": torch.zeros(3, 4)}, TypeError, "`B` must be float32 or .*; got complex64"),
        ({"C": torch.zeros(3, 5)}, ValueError, r"`C` must have shape \(d n\) with d=3, n=4; got \(3, 5\)"),
        ({"dt": torch.zeros(4)}, ValueError, r"`dt` must have shape \(d\) with d=3; got \(4,\)"),
        ({"dt": torch.zeros(3, dtype=torch.complex64)}, TypeError, "`dt` must be .*; got complex64"),
        ({"length": -1}, ValueError, "`length` must be at least 0; got -1"),
        ({"length": 4.0}, TypeError, "`length` must be an int; got float"),
        (
            {"discretization": "zho"},
            ValueError,
            "unknown discretization: 'zho'. Did you mean 'zoh'.* bilinear, dss, zoh",
        ),
    ],
)
def test_errors(changes, error, match, arguments):
    with pytest.raises(error, match="diagonal_kernel: .*" + match):
        diagonal_kernel(**arguments(torch.float32) | changes)


def test_errors_of_discretize(randn):
    with pytest.raises(ValueError, match="discretize_diagonal: unknown discretization: 'foh'"):
        discretize_diagonal(randn(3, 4), randn(3, 4), randn(3), discretization="foh")
    with pytest.raises(ValueError, match=r"discretize_diagonal: `B` must have shape \(d n\)"):
        discretize_diagonal(randn(3, 4), randn(4, 3), randn(3))
