"""The native kernels, beyond what every implementation must pass: threads, odd sizes, memory."""

from __future__ import annotations

import functools

import pytest
import torch
from convolution_inputs import convolution_inputs

from ssmkernels import OPS, causal_conv1d, causal_conv1d_step, explain, native, selective_scan, selective_scan_step
from ssmkernels.ops.selective_scan import cpu as scan_cpu
from ssmkernels.ops.selective_scan.cpu_arguments import chunk_length
from ssmkernels.testing import check

pytestmark = [
    pytest.mark.op("selective_scan", "causal_conv1d"),
    pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}"),
]

SCAN = functools.partial(selective_scan, return_final_state=True, delta_softplus=True)
CONV = functools.partial(causal_conv1d, return_final_state=True, activation="silu")
SCAN_REFERENCE, CONV_REFERENCE = (functools.partial(f, implementation="reference") for f in (SCAN, CONV))
SCAN, CONV = (functools.partial(f, implementation="cpu") for f in (SCAN, CONV))
COMPLEX = functools.partial(SCAN)  # of a complex A


@pytest.fixture
def scan_inputs(randn):
    def make(dtype=torch.float32, *, b=2, l=100, d=70, n=16, g=None, cu_seqlens=None, state=True, complex=False):
        wide = torch.promote_types(dtype, torch.float32)
        number = torch.promote_types(wide, torch.complex64) if complex else wide
        A = -randn(d, n, dtype=wide).abs()
        s = b if cu_seqlens is None else len(cu_seqlens) - 1
        groups = () if g is None else (g,)
        made = {
            "u": randn(b, l, d, dtype=dtype),
            "delta": randn(b, l, d, dtype=dtype),
            "A": torch.complex(A, 3 * randn(d, n, dtype=wide)) if complex else A,
            "B": randn(b, l, *groups, n, dtype=number if complex else dtype),
            "C": randn(b, l, *groups, n, dtype=number if complex else dtype),
            "D": randn(d, dtype=wide),
            "z": randn(b, l, d, dtype=dtype),
            "delta_bias": randn(d, dtype=wide),
            "initial_state": randn(s, d, n, dtype=number) if state else None,
        }
        if cu_seqlens is not None:
            made["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        return {name: value for name, value in made.items() if value is not None}

    return make


@pytest.fixture
def conv_inputs(randn):
    def make(dtype=torch.float32, *, b=2, l=100, d=70, w=4, cu_seqlens=None):
        return convolution_inputs(randn, dtype, b=b, l=l, d=d, w=w, cu_seqlens=cu_seqlens, wide_weight=True)

    return make


@pytest.fixture
def inputs(request, scan_inputs, conv_inputs):
    return {SCAN: scan_inputs, COMPLEX: functools.partial(scan_inputs, complex=True), CONV: conv_inputs}


EACH = pytest.mark.parametrize(
    "function", [SCAN, COMPLEX, CONV], ids=["selective_scan", "complex selective_scan", "causal_conv1d"]
)


REAL_AND_COMPLEX = pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@REAL_AND_COMPLEX
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 16, 17, 32, 64, 100, 256])
def test_any_state_size(n, complex, scan_inputs, run, assert_same):
    made = scan_inputs(torch.float64, b=1, l=11, d=5, n=n, complex=complex)
    assert_same(run(SCAN, **made), run(SCAN_REFERENCE, **made))


@REAL_AND_COMPLEX
@pytest.mark.parametrize("n", [16, 40])
def test_across_chunks(n, complex, scan_inputs, run, assert_same):
    n = n // 2 if complex else n
    A = scan_inputs(d=1, n=n, complex=complex)["A"]
    made = scan_inputs(torch.float64, b=1, l=2 * chunk_length(A) + 3, d=66, n=n, complex=complex)
    assert_same(run(SCAN, **made), run(SCAN_REFERENCE, **made))


@pytest.mark.parametrize("w", range(1, 8))
def test_any_width(w, conv_inputs, assert_same):
    made = conv_inputs(torch.float64, l=130, d=67, w=w)
    expected = CONV_REFERENCE(**made)
    for found, wanted in zip(CONV(**made), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("w", [2, 3, 4, 5, 9])
def test_gradients_across_blocks(w, conv_inputs, run, assert_same):
    made = conv_inputs(torch.float64, l=130, d=67, w=w)
    assert_same(run(CONV, **made), run(CONV_REFERENCE, **made))
    packed = conv_inputs(torch.float64, b=1, l=200, d=5, w=w, cu_seqlens=[0, 0, 64, 65, 66, 68, 131, 200, 200])
    assert_same(run(CONV, **packed), run(CONV_REFERENCE, **packed))


@EACH
def test_many_short_sequences(function, inputs, run, assert_same):
    """More than one window of the scan's backward pass holds, and more than the convolution has groups of blocks."""
    made = inputs[function](torch.float64, b=1, l=150, d=6, cu_seqlens=list(range(0, 151, 2)))
    reference = functools.partial(function, implementation="reference")
    assert_same(run(function, **made), run(reference, **made))


def test_windows_of_positions(scan_inputs, run, assert_same):
    """One sequence in several windows of the backward pass: each tile's sums over channels are large here."""
    made = scan_inputs(torch.float64, b=1, l=1030, d=64, n=256, g=32, state=False)
    assert_same(run(SCAN, **made), run(functools.partial(SCAN, implementation="tiled"), **made))


def test_windows_of_positions_of_complex_states(scan_inputs, run, assert_same):
    """A complex A without an imaginary part, which stands for itself and its conjugate, is twice the real one."""
    made = scan_inputs(torch.float64, b=1, l=1030, d=64, n=128, g=32, state=False)
    scan = functools.partial(SCAN, return_final_state=False)
    found = run(scan, **{name: v + 0j if name in ("A", "B", "C") else v for name, v in made.items()})
    expected = run(functools.partial(scan, implementation="tiled"), **made | {"C": 2 * made["C"]})
    expected["gradient of C"] *= 2
    assert_same({name: f.real for name, f in found.items()}, expected)


@EACH
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_the_same_bits_on_any_number_of_threads(function, packed, inputs, run, on_threads):
    shape = {"b": 1, "l": 150, "cu_seqlens": [0, 5, 5, 100, 150]} if packed else {"b": 3, "l": 70}
    made = inputs[function](**shape, d=130)
    assert same_bits(*(on_threads(number, run, function, **made) for number in (1, 2)))


@EACH
def test_a_sequence_has_its_bits_in_any_company(function, inputs, run):
    made = inputs[function](b=3, l=70, d=67)
    timed = [name for name, value in made.items() if value.shape[0] == 3]
    whole = function(**made)
    for i in range(3):
        alone = function(**{n: v[i : i + 1] if n in timed else v for n, v in made.items()})
        assert all(torch.equal(a, w[i : i + 1]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.parametrize("d", [1040, 1003], ids=["rows on a vector's border", "rows anywhere"])
def test_large_results_past_the_caches_have_the_bits_of_small_ones(d, scan_inputs):
    """Two sequences together are over 16 MB, one alone is not."""
    made = scan_inputs(b=2, l=2100, d=d, n=2, state=False)
    each = [name for name, value in made.items() if value.ndim == 3]

    def results(arguments):
        leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
        y, _ = SCAN(**leaves)
        return y, *torch.autograd.grad(y.sin().sum(), [leaves[name] for name in each])

    together = results(made)
    assert together[0].nbytes >= 2**24
    for i in range(2):
        alone = results({n: v[i : i + 1] if n in each else v for n, v in made.items()})
        assert all(torch.equal(a, t[i : i + 1]) for a, t in zip(alone, together, strict=True))


@EACH
def test_half_precision_is_float32_rounded_at_the_end(function, inputs):
    for dtype in (torch.bfloat16, torch.float16):
        made = inputs[function](dtype, l=70, d=37)
        y, state = function(**made)
        wide = {n: v.to(torch.promote_types(v.dtype, torch.float32)) for n, v in made.items()}
        wide_y, wide_state = function(**wide)
        assert torch.equal(y, wide_y.to(dtype))
        assert torch.equal(state, wide_state)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 65504.0, -65504.0, 6e-8, 6.1e-5, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_every_kind_of_number(value, dtype):
    x = torch.full((1, 3, 21), value).to(dtype)
    y = causal_conv1d(x, torch.ones(21, 1), implementation="cpu")
    assert torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z", "initial_state"])
@pytest.mark.parametrize(
    ("value", "complex"),
    [(torch.inf, False), (-torch.inf, False), (torch.nan, False), (torch.nan, True)],
    ids=["inf", "-inf", "nan", "nan, complex"],
)
def test_what_is_not_finite_goes_where_the_reference_lets_it(name, value, complex, scan_inputs):
    made = scan_inputs(b=1, l=9, d=5, n=3, complex=complex)
    made[name][(0,) * (made[name].ndim - 1)][1] = value
    for found, wanted in zip(SCAN(**made), SCAN_REFERENCE(**made), strict=True):
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turns", [1.0, 1e3, 1e5])
def test_angles_of_many_turns(turns, scan_inputs, assert_in_budget):
    """One step turns the state by about so many radians, an angle that float32 knows, in the end, to 0.1 or so."""
    made = scan_inputs(b=1, l=9, d=37, n=5, complex=True)
    made["A"] = torch.complex(made["A"].real / 100, made["A"].imag * turns)
    made["delta"] = made["delta"].abs()
    exact = {"delta_softplus": False, "delta_bias": None}  # a Δ of one rounding more is an angle of one more
    assert_in_budget(SCAN, SCAN_REFERENCE, **made | exact)


def test_a_whole_turn_is_none():
    """exp(2 pi i k) = 1, where the angle is a product that float32 would round."""
    k = torch.arange(1, 33, dtype=torch.float64)
    A = torch.complex(torch.zeros(1, 32, dtype=torch.float64), (2 * torch.pi * k)[None])
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    state = torch.ones(1, 1, 32, dtype=torch.complex128)
    B = torch.zeros(1, 1, 32, dtype=torch.float64)
    _, found = SCAN(one, one, A, B, B, initial_state=state, delta_softplus=False)
    torch.testing.assert_close(found, state, rtol=0, atol=1e-13)


def test_conjugate_views(scan_inputs, run, assert_same):
    """Conjugates that PyTorch has not yet computed count as such, also in the final state's gradient."""
    made = scan_inputs(torch.float64, l=5, d=3, n=2, complex=True)

    def of_conjugates(**arguments):
        y, state = SCAN(**{n: v.conj() if v.is_complex() else v for n, v in arguments.items()})
        return y, state.conj()

    def of_copies(**arguments):
        y, state = SCAN_REFERENCE(**{n: v.conj().resolve_conj() for n, v in arguments.items()})
        return y, state.conj().resolve_conj()

    assert_same(run(of_conjugates, **made), run(of_copies, **made))


@torch.no_grad()
def test_complex_steps_are_the_scan(scan_inputs):
    made = scan_inputs(l=7, d=37, n=5, g=1, complex=True)
    y, final_state = SCAN(**made)
    state = made.pop("initial_state").clone()
    for t in range(7):
        now = {k: v[:, t] if k in ("u", "delta", "B", "C", "z") else v for k, v in made.items()}
        found = selective_scan_step(state, **now, delta_softplus=True, implementation="cpu")
        torch.testing.assert_close(found, y[:, t])
    torch.testing.assert_close(state, final_state)


@pytest.mark.parametrize("growth", [0.5, 3.0, 30.0, 200.0])
def test_growing_states(growth, scan_inputs):
    """A may be positive: up to the largest number, and then infinity, as in the reference."""
    made = scan_inputs(b=1, l=5, d=5, n=3, state=False) | {"A": torch.full((5, 3), growth)}
    for found, wanted in zip(SCAN(**made), SCAN_REFERENCE(**made), strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_memory_above_inputs_and_outputs(scan_inputs):
    """Saved for the backward pass: the states at the chunks' starts, a quarter of one activation at n 16."""
    made = scan_inputs(b=1, l=640, d=64, n=16)
    takes = OPS["selective_scan"].declared.Arguments
    absent = {"delta_softplus": True, "initial_state": None, "cu_seqlens": None}
    _, _, starts = scan_cpu.forward(takes(**made | absent), True)
    assert starts.numel() * 4 == made["u"].numel()


def test_what_it_cannot_do_is_said(scan_inputs):
    made = scan_inputs(l=3, d=2, n=2)
    assert explain(selective_scan, **made).chosen == "cpu"
    stateless = made | {name: made[name][..., :0] for name in ("A", "B", "C", "initial_state")}
    assert "no states" in explain(selective_scan, **stateless).reasons["cpu"]
    on_meta = {name: value.to("meta") for name, value in made.items()}
    assert "must be on the CPU; `u` is on meta" in explain(selective_scan, **on_meta).reasons["cpu"]
    state, x, weight = torch.zeros(1, 3, 2), torch.zeros(1, 2), torch.zeros(2, 4, requires_grad=True)
    assert "no gradient" in explain(causal_conv1d_step, state, x, weight).reasons["cpu"]
    with torch.no_grad():
        assert explain(causal_conv1d_step, state, x, weight).chosen == "cpu"


@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 5, 17]])
def test_opcheck(cu_seqlens, scan_inputs, conv_inputs, opcheck):
    shape = {"b": 2 if cu_seqlens is None else 1, "l": 17, "d": 5, "cu_seqlens": cu_seqlens}
    made = {"cu_seqlens": None, **scan_inputs(**shape, n=3)}
    scan, conv = (OPS[name].implementation("cpu").function.operator for name in ("selective_scan", "causal_conv1d"))
    opcheck(scan, made | {"delta_softplus": True, "save": True})
    made = {"cu_seqlens": None, **scan_inputs(**shape, n=3, complex=True)}
    opcheck(scan, made | {"B": made["B"].real.clone(), "delta_softplus": True, "save": True})
    opcheck(conv, {"cu_seqlens": None, **conv_inputs(**shape)} | {"activation": "silu", "save": True})


@EACH
def test_compiles(function, inputs, assert_compiles):
    assert_compiles(function, **inputs[function](b=1, l=9, d=5, cu_seqlens=[0, 4, 9]))


@EACH
def test_compiled_code_checks_the_borders(function, inputs):
    """No kernel reads where they point before they are known to lie within the batch."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    made = inputs[function](b=1, l=9, d=5, cu_seqlens=[0, 4, 9])
    compiled(**made)
    wrong = torch.tensor([0, 4, 10**6], dtype=torch.int32)
    with torch.no_grad(), pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to the length 9"):
        compiled(**made | {"cu_seqlens": wrong})


@torch.no_grad()
def test_the_steps_compile(scan_inputs, conv_inputs):
    made = scan_inputs(b=2, l=1, d=5, n=3)
    now = {n: v[:, 0] if n in ("u", "delta", "B", "C", "z") else v for n, v in made.items()}
    scan_state = now.pop("initial_state")
    conv = conv_inputs(b=2, l=1, d=5)
    conv_state = conv.pop("initial_state")
    conv["x"] = conv["x"][:, 0]
    turning = now | {"A": now["A"] * (1 + 1j)}
    for step, state, rest in (
        (selective_scan_step, scan_state, now),
        (selective_scan_step, scan_state + 1j, turning),
        (causal_conv1d_step, conv_state, conv),
    ):
        eager, compiled = state.clone(), state.clone()
        torch._dynamo.reset()
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, **rest)
        assert torch.equal(found, step(eager, **rest))
        assert torch.equal(compiled, eager)
        assert not torch.equal(compiled, state)


@pytest.mark.parametrize("op", ["selective_scan_step", "causal_conv1d_step"])
def test_the_whole_check_of_a_step(op):
    check(op, "cpu", quick=True)
