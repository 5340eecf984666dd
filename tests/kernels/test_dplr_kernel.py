from __future__ import annotations

import functools

import pytest
import torch

from ssmkernels import OPS, bilinear_dplr, bilinear_step, discretize_dplr, dplr_kernel, explain
from ssmkernels.ops.dplr_kernel import cauchy, tiled
from ssmkernels.ops.dplr_kernel.peers import PEERS

NAMES = OPS["dplr_kernel"].names
CIRCLE = ("triton", "cauchy")  # by an FFT, which in double precision takes but a few taps


@functools.cache
def kernel(name):
    return functools.partial(dplr_kernel, implementation=name)


def able(name, discretization="bilinear"):
    why = OPS["dplr_kernel"].why_not(name)
    if why:
        pytest.skip(why)
    if discretization == "zoh" and name in ("cpu", *CIRCLE):
        pytest.skip(f"needs a discretisation that {name} knows")
    return kernel(name)


EACH = pytest.mark.parametrize("name", NAMES)
RULES = pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
COMPLEX = pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])
RANKS = pytest.mark.parametrize("rank", [None, 1, 2])


@pytest.fixture
def arguments(randn):
    """A stable system whose P and Q differ."""

    def make(dtype=torch.float64, *, d=3, n=4, rank=1, length=17, complex=True, discretization="bilinear"):
        kind = torch.complex128 if complex else torch.float64
        A, B, C = (randn(d, n, dtype=kind) for _ in range(3))
        A = torch.complex(-A.real.abs() - 0.2, 4 * A.imag) if complex else -A.abs() - 0.2
        P, apart = (randn(d, *([] if rank is None else [rank]), n, dtype=kind) for _ in range(2))
        made = {"A": A, "P": P, "Q": P + 0.05 * apart, "B": B, "C": C}
        kind = torch.promote_types(dtype, torch.complex64) if complex else dtype
        made = {name: value.to(kind) for name, value in made.items()}
        made["dt"] = torch.linspace(0.05, 0.5, d, dtype=torch.float64).to(dtype)
        return made | {"length": length, "discretization": discretization}

    return make


def conjugates(x):
    return torch.cat([x, x.conj().resolve_conj()], dim=-1) if x.is_complex() else x


def by_matrices(A, P, Q, B, C, dt, length, discretization):
    """Dense complex matrices, the conjugates among their entries; nothing of the real form of half of them."""
    P, Q, B, C = (x.to(A.dtype) for x in (P, Q, B, C))
    P, Q = (x if x.ndim == 3 else x[:, None] for x in (P, Q))
    A, P, Q, B, C = (conjugates(x) for x in (A, P, Q, B, C))
    system = torch.diag_embed(A) - torch.einsum("drn,drm->dnm", P, Q.conj())
    eye = torch.eye(A.shape[1], dtype=A.dtype)
    scaled, push = dt[:, None, None] * system, dt[:, None] * B
    if discretization == "zoh":
        A_bar = torch.linalg.matrix_exp(scaled)
        B_bar = torch.linalg.solve(scaled, (A_bar - eye) @ push[..., None])[..., 0]
    else:
        inverse = torch.linalg.inv(eye - scaled / 2)
        A_bar, B_bar = inverse @ (eye + scaled / 2), (inverse @ push[..., None])[..., 0]
    taps = [torch.einsum("dn,dnm,dm->d", C, torch.linalg.matrix_power(A_bar, t), B_bar) for t in range(length)]
    taps = torch.stack(taps, dim=-1)
    return taps.real if taps.is_complex() else taps


@EACH
@RULES
@COMPLEX
@RANKS
def test_it_is_powers_of_matrices(name, discretization, complex, rank, arguments, run, assert_same):
    made = arguments(complex=complex, rank=rank, discretization=discretization)
    assert_same(run(able(name, discretization), **made), run(by_matrices, **made), roundings=512)


@EACH
@COMPLEX
@pytest.mark.parametrize("length", [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 131, 251, 509])
def test_any_length(name, complex, length, arguments, run, assert_same):
    if name in CIRCLE and length > cauchy.PRECISE:
        pytest.skip("needs what keeps the digits of small taps in float64")
    made = arguments(complex=complex, length=length, rank=2)
    assert_same(run(able(name), **made), run(kernel("reference"), **made), roundings=512)


@EACH
@COMPLEX
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 100])
def test_any_state_size(name, complex, n, arguments, run, assert_same):
    made = arguments(complex=complex, n=n, d=2, length=50)
    made["P"], made["Q"] = made["P"] / n**0.5, made["Q"] / n**0.5
    assert_same(run(able(name), **made), run(kernel("reference"), **made), roundings=512)


@EACH
@pytest.mark.parametrize("size", [{"d": 0}, {"n": 0}, {"rank": 0}], ids=str)
def test_nothing_in_it(name, size, arguments, run, assert_same):
    made = arguments(**size)
    if OPS["dplr_kernel"].why_not(name, OPS["dplr_kernel"].declared.Arguments(**made)):
        pytest.skip(f"needs what {name} can run")
    assert_same(run(kernel(name), **made), run(kernel("reference"), **made))
    assert kernel(name)(**made).shape == (made["A"].shape[0], 17)


def hippo_legs(n, dtype=torch.float64):
    """The HiPPO-LegS matrix and input map (n n), (n), and its normal plus low-rank form of n/2 conjugate pairs.

    Gu, Goel and Ré 2022, arXiv 2111.00396, appendix C.1: A + P Pᵀ = -1/2 + a skew-symmetric matrix.
    """
    odd = 2 * torch.arange(n, dtype=torch.float64) + 1
    root = odd.sqrt()
    A = -torch.tril(root[:, None] * root, diagonal=-1) - torch.diag(torch.arange(n, dtype=torch.float64) + 1)
    P = (odd / 2).sqrt()
    skew = A + P[:, None] * P + torch.eye(n) / 2
    frequencies, V = torch.linalg.eigh(-1j * skew)
    half, V = frequencies[n // 2 :], V[:, n // 2 :]
    system = {"A": torch.complex(torch.full_like(half, -0.5), half), "P": V.mH @ (P + 0j), "B": V.mH @ (root + 0j)}
    return A, root, V, system


@EACH
@pytest.mark.parametrize(("n", "length"), [(16, 4096), (64, 4096), (256, 4096)])
def test_powers_of_the_hippo_matrix(name, n, length, randn):
    """Against the dense real matrix in its own basis: 1e-8 in double precision, 1e-4 in single."""
    function = able(name)
    A, B, V, system = hippo_legs(n)
    steps = torch.tensor([1e-3, 1e-1], dtype=torch.float64)
    C = randn(n)
    eye = torch.eye(n, dtype=torch.float64)
    expected = []
    for dt in steps:
        both = torch.cat([eye + dt * A / 2, dt * B[:, None]], dim=1)
        solved = torch.linalg.solve_triangular(eye - dt * A / 2, both, upper=False)
        A_bar, h = solved[:, :-1], solved[:, -1]
        taps = []
        for _ in range(length):
            taps.append(C @ h)
            h = A_bar @ h
        expected.append(torch.stack(taps))
    expected = torch.stack(expected)
    system |= {"Q": system["P"], "C": C.to(V.dtype) @ V}
    system = {key: value.expand(2, -1) for key, value in system.items()}
    largest = expected.abs().amax(dim=1, keepdim=True)
    if name not in CIRCLE:  # which refuse so many taps in double precision
        found = function(**system, dt=steps, length=length)
        assert ((found - expected).abs() <= 1e-8 * largest).all()
    system = {key: value.to(torch.complex64) for key, value in system.items()}
    found = function(**system, dt=steps.float(), length=length)
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= 1e-4 * largest).all()


@EACH
def test_what_does_not_decay_keeps_its_digits(name, arguments, run, assert_same):
    """Ā^length is all but I: the paper's C (I - Ā^length) has lost eight digits there."""
    made = arguments(length=33)
    made["A"], made["dt"] = torch.complex(made["A"].real * 1e-3, made["A"].imag), made["dt"] * 1e-6
    made["P"], made["Q"] = made["P"] * 1e-2, made["Q"] * 1e-2
    found, expected = run(able(name), **made), run(kernel("reference"), **made)
    relative = {key: value / max(float(value.abs().max()), 1e-300) for key, value in expected.items()}
    found = {key: value / max(float(expected[key].abs().max()), 1e-300) for key, value in found.items()}
    assert_same(found, relative, roundings=512)


@pytest.mark.parametrize("length", [100, 5000])
def test_tiled_never_holds_all_powers(length, arguments, monkeypatch):
    counts = []
    table = tiled._table
    monkeypatch.setattr(tiled, "_table", lambda row, m, count: counts.append(count) or table(row, m, count))
    kernel("tiled")(**arguments(length=length))
    assert len(counts) == 2
    assert sum(counts) <= 4 * length**0.5


def test_cauchy_goes_through_the_frequencies_in_chunks(arguments, run, assert_same, monkeypatch):
    made = arguments(length=200)
    whole = run(kernel("cauchy"), **made)
    sizes = []
    transfer = cauchy._transfer
    monkeypatch.setattr(cauchy, "_transfer", lambda *a: sizes.append(a[4].numel()) or transfer(*a))
    monkeypatch.setattr(cauchy, "CHUNK", 3 * 8 * 10)
    assert_same(run(kernel("cauchy"), **made), whole)
    assert sizes[:11] == [10] * 10 + [1]
    assert len(sizes) == 22  # once more for the gradients


@EACH
@COMPLEX
@RANKS
def test_gradcheck(name, complex, rank, arguments):
    made = arguments(complex=complex, rank=rank, d=2, n=3, length=37)
    values = [made[key].requires_grad_() for key in ("A", "P", "Q", "B", "C", "dt")]
    torch.autograd.gradcheck(lambda *v: able(name)(*v, 37), values, fast_mode=True)


@EACH
def test_gradients_in_single_precision(name, arguments, assert_in_budget):
    assert_in_budget(able(name), kernel("reference"), **arguments(torch.float32, length=150, n=9))


@EACH
@RULES
def test_any_strides(name, discretization, arguments, run, assert_same, spread):
    made = arguments(discretization=discretization)
    function = able(name, discretization)
    assert_same(run(function, **spread(made)), run(function, **made))


@EACH
def test_real_maps_beside_a_complex_A(name, arguments, run, assert_same):
    made = arguments()
    made |= {key: made[key].real.clone() for key in "PQBC"}
    assert_same(run(able(name), **made), run(by_matrices, **made), roundings=512)


@EACH
def test_one_double_among_singles_makes_the_kernel_double(name, arguments, assert_same):
    made = arguments(torch.float32)
    for key in ("C", "dt"):
        changed = made | {key: made[key].to(torch.promote_types(made[key].dtype, torch.float64))}
        exact = {k: v.to(torch.promote_types(v.dtype, torch.float64)) for k, v in made.items() if hasattr(v, "dtype")}
        found = able(name)(**changed)
        assert_same({"K": found}, {"K": kernel("reference")(**made | exact)}, roundings=512)


def test_the_same_bits_on_any_number_of_threads(arguments, run):
    made = arguments(torch.float32, d=9, length=300)
    before = torch.get_num_threads()
    results = []
    for number in (1, 3):
        torch.set_num_threads(number)
        results.append(run(able("cpu"), **made))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(name, dtype, arguments):
    made = arguments(dtype, complex=False)
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    assert able(name)(**made).dtype == torch.float32
    assert torch.equal(able(name)(**made), able(name)(**wide))


@EACH
@COMPLEX
def test_compiles(name, complex, arguments, assert_compiles):
    assert_compiles(able(name), **arguments(torch.float32, complex=complex))


@pytest.mark.parametrize("name", ["tiled", "reference", "cauchy"])
@pytest.mark.parametrize("variant", [{}, {"complex": False}, {"length": 0}], ids=str)
def test_opcheck(name, variant, arguments, opcheck):
    opcheck(OPS["dplr_kernel"].implementation(name).function.operator, arguments(**variant))


@pytest.mark.parametrize("pairs", [False, True])
def test_opcheck_of_the_native_operators(pairs, randn):
    if why := OPS["dplr_kernel"].why_not("cpu"):
        pytest.skip(why)
    shapes = ((2, 6), (2, 1, 6), (2, 1, 6), (2, 6), (2, 6))
    tensors = [(randn(*shape) / 4).requires_grad_() for shape in shapes]
    operators = torch.ops.ssmkernels
    torch.library.opcheck(operators.dplr_taps_cpu, (*tensors, 40, pairs, False, True))
    tensors = [t.detach() for t in tensors]
    wanted = [0, 1, 2, 3, 4]
    torch.library.opcheck(operators.dplr_taps_cpu_backward, (*tensors, 40, pairs, False, randn(2, 40), wanted))


def test_the_fastest_runs_and_the_others_say_why(arguments):
    assert explain("dplr_kernel", **arguments()).chosen in ("triton", "cpu", "tiled")
    told = explain("dplr_kernel", **arguments(discretization="zoh"))
    assert told.chosen == "tiled"
    assert "bilinear" in told.reasons["cauchy"]


def test_the_peer_computes_the_same(arguments):
    (peer,) = PEERS["dplr_kernel"]
    made = arguments(length=64)
    torch.testing.assert_close(peer.function(**made), kernel("reference")(**made), rtol=1e-4, atol=1e-4)


@RULES
@COMPLEX
@RANKS
def test_the_kernel_is_what_the_dense_step_does(discretization, complex, rank, arguments):
    made = arguments(complex=complex, rank=rank, discretization=discretization)
    C, length = made.pop("C"), made.pop("length")
    A_bar, B_bar = discretize_dplr(**made)
    N = 8 if complex else 4
    assert (A_bar.shape, B_bar.shape) == ((3, N, N), (3, N))
    C_real = torch.cat([2 * C.real, -2 * C.imag], dim=-1) if complex else C
    h, y = torch.zeros_like(B_bar), []
    for t in range(length):
        h = (A_bar @ h[..., None])[..., 0] + B_bar * (t == 0)
        y.append((C_real * h).sum(-1))
    torch.testing.assert_close(kernel("reference")(**made, C=C, length=length), torch.stack(y, dim=-1))


@COMPLEX
@RANKS
def test_the_structured_step_is_the_dense_one(complex, rank, arguments, randn):
    made = arguments(complex=complex, rank=rank)
    system = {key: made[key] for key in ("A", "P", "Q", "B", "dt")}
    A_bar, B_bar = discretize_dplr(**system)
    h, u = randn(2, 3, 4, dtype=made["A"].dtype), randn(2, 3)
    wide = torch.cat([h.real, h.imag], dim=-1) if complex else h
    expected = torch.einsum("dnm,bdm->bdn", A_bar, wide) + B_bar * u[..., None]
    found = bilinear_step(h, u, **system)
    assert found.dtype == h.dtype
    torch.testing.assert_close(torch.cat([found.real, found.imag], dim=-1) if complex else found, expected)
    assert torch.equal(bilinear_dplr(**system).step(h, u), found)


def test_the_structured_step_in_single_precision_forgets_nothing(arguments):
    """5000 steps whose states are float32: each is rounded, but the system is not."""
    made = arguments(torch.float32, length=5000)
    made["dt"] = made["dt"] * 1e-2
    C, length = made.pop("C"), made.pop("length")
    system = bilinear_dplr(**{key: made[key] for key in ("A", "P", "Q", "B", "dt")})
    h, y = torch.zeros(1, 3, 4, dtype=torch.complex64), []
    for t in range(length):
        h = system.step(h, torch.full((1, 3), float(t == 0)))
        y.append(2 * (C * h).sum(-1).real)
    exact = {key: value.to(torch.complex128) if value.is_complex() else value.double() for key, value in made.items()
             if isinstance(value, torch.Tensor)}  # fmt: skip
    expected = kernel("tiled")(**exact, C=C, length=length)
    torch.testing.assert_close(torch.cat(y).mT.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@RULES
@COMPLEX
def test_discretize_gradcheck(discretization, complex, arguments):
    made = arguments(complex=complex, rank=2, d=2)
    values = [made[name].requires_grad_() for name in ("A", "P", "Q", "B", "dt")]
    torch.autograd.gradcheck(lambda *v: discretize_dplr(*v, discretization=discretization), values, fast_mode=True)
    if discretization == "bilinear":
        torch.autograd.gradcheck(lambda *v: tuple(bilinear_dplr(*v)), values, fast_mode=True)


def test_zoh_of_a_singular_matrix():
    """Without dynamics the input adds up: Ā = 1, B̄ = ΔB."""
    zero, dt = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    A_bar, B_bar = discretize_dplr(zero, zero, zero, torch.tensor([[3.0, 4.0]]), dt, discretization="zoh")
    assert torch.equal(A_bar, torch.eye(2, dtype=torch.float64)[None])
    assert torch.equal(B_bar, torch.tensor([[1.5, 2.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"A": torch.zeros(3)}, ValueError, r"`A` must have shape \(d n\); got \(3,\)"),
        ({"A": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "`A` must be .*; got int64"),
        ({"A": torch.zeros(3, 4)}, TypeError, "`P` must be float32 or .*; got complex64"),
        ({"P": torch.zeros(3, 5)}, ValueError, r"`P` must have shape \(d n\) or \(d r n\) with .*; got \(3, 5\)"),
        ({"Q": torch.zeros(3, 4)}, ValueError, r"`Q` must have the shape of `P`, \(3, 1, 4\); got \(3, 4\)"),
        ({"Q": torch.zeros(3, 2, 4)}, ValueError, r"`Q` must have shape .* r=1.*; got \(3, 2, 4\)"),
        ({"C": torch.zeros(3, 5)}, ValueError, r"`C` must have shape \(d n\) with .*; got \(3, 5\)"),
        ({"dt": torch.zeros(4)}, ValueError, r"`dt` must have shape \(d\) with d=3; got \(4,\)"),
        ({"dt": torch.zeros(3, dtype=torch.complex64)}, TypeError, "`dt` must be .*; got complex64"),
        ({"length": -1}, ValueError, "`length` must be at least 0; got -1"),
        ({"length": 4.0}, TypeError, "`length` must be an int; got float"),
        ({"discretization": "zho"}, ValueError, "unknown discretization: 'zho'. Did you mean 'zoh'.* bilinear, zoh"),
    ],
)
def test_errors(changes, error, match, arguments):
    with pytest.raises(error, match="dplr_kernel: .*" + match):
        dplr_kernel(**arguments(torch.float32) | changes)


def test_errors_of_the_others(randn):
    with pytest.raises(ValueError, match="discretize_dplr: unknown discretization: 'dss'"):
        discretize_dplr(*[randn(3, 4)] * 4, randn(3), discretization="dss")
    with pytest.raises(ValueError, match=r"bilinear_dplr: `B` must have shape \(d n\)"):
        bilinear_dplr(*[randn(3, 4)] * 3, randn(4, 3), randn(3))
