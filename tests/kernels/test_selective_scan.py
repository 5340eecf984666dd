from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from implementations import each_of, implemented

from ssmkernels import OPS, selective_scan, selective_scan_step
from ssmkernels.ops.selective_scan import tiled

REFERENCE, TILED = implemented(selective_scan, "reference", "tiled", return_final_state=True)
EITHER = each_of("scan", [REFERENCE, TILED])

# A base case, and what each further one varies.
CASES = {
    "base": {},
    "plain": {"D": False, "z": False, "delta_bias": False, "softplus": False, "initial_state": False},
    "groups": {"g": 2},
    "a group a channel": {"g": 4},
    "one state": {"n": 1},
    "one channel": {"d": 1},
    "empty batch": {"b": 0},
    "length 0": {"l": 0},
    "length 1": {"l": 1},
    "odd length": {"l": 131},
    "packed": {"cu_seqlens": [0, 5, 5, 6, 17, 17]},
    "packed, no initial state": {"cu_seqlens": [0, 0, 17], "initial_state": False},
    "packed, nothing": {"cu_seqlens": [0, 0, 0], "l": 0},
    "packed, groups": {"cu_seqlens": [0, 3, 17], "g": 2},
}
OF_REFERENCE = {
    "fixed B": {"fixed": "B"},
    "fixed C": {"fixed": "C"},
    "fixed B and C, packed": {"fixed": "BC", "cu_seqlens": [0, 3, 3, 17]},
    "complex A": {"complex": "A"},
    "complex A, B and C": {"complex": "ABC"},
    "complex and fixed": {"complex": "ABC", "fixed": "BC"},
    "complex, groups, packed": {"complex": "ABC", "g": 2, "cu_seqlens": [0, 3, 3, 17]},
}


@pytest.fixture
def arguments(randn):
    def make(
        dtype=torch.float64,
        *,
        b=2,
        l=17,
        d=4,
        n=3,
        g=0,
        fixed="",
        complex="",
        softplus=True,
        cu_seqlens=None,
        **given,
    ):
        wide = torch.promote_types(dtype, torch.float32)
        complex_wide = torch.promote_types(wide, torch.complex64)
        b = b if cu_seqlens is None else 1
        s = b if cu_seqlens is None else len(cu_seqlens) - 1

        def matrix(name, *shape, dtype):
            return randn(*((d, n) if name in fixed else shape), dtype=complex_wide if name in complex else dtype)

        groups = (g,) if g else ()
        A = matrix("A", d, n, dtype=wide)
        made = {
            "u": randn(b, l, d, dtype=dtype),
            "delta": randn(b, l, d, dtype=dtype) if softplus else randn(b, l, d, dtype=dtype).abs() / 2,
            "A": torch.complex(-A.real.abs(), A.imag) if A.is_complex() else -A.abs(),
            "B": matrix("B", b, l, *groups, n, dtype=dtype),
            "C": matrix("C", b, l, *groups, n, dtype=dtype),
            "D": randn(d, dtype=wide),
            "z": randn(b, l, d, dtype=dtype),
            "delta_bias": randn(d, dtype=wide),
            "initial_state": randn(s, d, n, dtype=A.dtype),
        }
        made = {name: value for name, value in made.items() if given.get(name, True)}
        made["delta_softplus"] = softplus
        if cu_seqlens is not None:
            made["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        return made

    return make


def dense(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    """All steps at once: h_t = Σ_{s≤t} exp(A (S_t - S_s)) Δ_s B_s u_s, with S the running sum of Δ."""
    b, l, d = u.shape
    if A.is_complex():  # the conjugates, as the entries that they are
        A, B, C = (torch.cat([x, x.conj().resolve_conj()], dim=-1) for x in (A, B.to(A.dtype), C.to(A.dtype)))
        if initial_state is not None:
            initial_state = torch.cat([initial_state, initial_state.conj()], dim=-1)
    delta = delta if delta_bias is None else delta + delta_bias
    delta = F.softplus(delta) if delta_softplus else delta

    def full(x):
        if x.ndim == 2:
            return x.expand(b, l, *x.shape)
        x = x[:, :, None] if x.ndim == 3 else x
        return repeat(x, "b l g n -> b l (g c) n", c=d // x.shape[2])

    B, C = full(B), full(C)
    S = delta.cumsum(1)
    past = torch.ones(l, l, dtype=torch.bool).tril()[None, :, :, None, None]
    decay = torch.where(past, torch.exp(A * (S[:, :, None] - S[:, None]).clamp(min=0)[..., None]), 0)
    h = torch.einsum("btsdn,bsd,bsdn,bsd->btdn", decay, delta.to(decay.dtype), B.to(decay.dtype), u.to(decay.dtype))
    last = h[:, -1]
    if initial_state is not None:
        h = h + torch.exp(A * S[..., None]) * initial_state[:, None]
        last = h[:, -1]
    y = (h * C).sum(-1)
    y = y.real if y.is_complex() else y
    y = y if D is None else y + D * u
    y = y if z is None else y * F.silu(z)
    return y, last[..., : last.shape[-1] // 2] if A.is_complex() else last


@pytest.mark.parametrize(
    "case",
    ["base", "plain", "groups", "a group a channel", "one state", "length 1", "fixed B", "fixed C"]
    + ["complex A", "complex A, B and C", "complex and fixed"],
)
def test_reference_is_the_unrolled_recurrence(case, arguments, run, assert_same):
    made = arguments(**(CASES | OF_REFERENCE)[case])
    assert_same(run(REFERENCE, **made), run(dense, **made))


@pytest.mark.parametrize("case", CASES)
def test_tiled_is_the_reference(case, arguments, run, assert_same):
    made = arguments(**CASES[case])
    assert_same(run(TILED, **made), run(REFERENCE, **made))


@pytest.mark.parametrize("case", ["base", "odd length", "packed", "packed, groups"])
def test_tiled_in_short_chunks(case, arguments, run, assert_same, monkeypatch):
    monkeypatch.setattr(tiled, "ELEMENTS", 2 * 2 * 4 * 3)  # two steps of the base case
    made = arguments(**CASES[case])
    assert_same(run(TILED, **made), run(REFERENCE, **made))


@EITHER
def test_half_precision_keeps_its_state_in_float32(scan, arguments):
    made = arguments(torch.bfloat16)
    y, state = scan(**made)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_state = scan(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in made.items()})
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    assert (y.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()  # one rounding


@EITHER
@pytest.mark.parametrize("case", ["base", "packed, groups"])
def test_any_strides(scan, case, arguments, run, assert_same, spread):
    made = arguments(**CASES[case])
    assert_same(run(scan, **spread(made)), run(scan, **made))


@EITHER
@pytest.mark.parametrize("complex", ["", "ABC"])
def test_step_by_step_is_at_once(scan, complex, arguments):
    scan = REFERENCE if complex else scan
    made = arguments(g=2, complex=complex)
    y, final_state = scan(**made)
    state = made.pop("initial_state").clone()
    for t in range(17):
        now = {k: v[:, t] if k in ("u", "delta", "B", "C", "z") else v for k, v in made.items()}
        torch.testing.assert_close(selective_scan_step(state, **now), y[:, t])
    torch.testing.assert_close(state, final_state)


@EITHER
def test_cut_is_whole(scan, arguments, run, assert_same):
    made = arguments()

    def cut(initial_state, **made):
        ys, state = [], initial_state
        for time in (slice(0, 1), slice(1, 9), slice(9, 9), slice(9, 17)):
            part = {k: v[:, time] if k in ("u", "delta", "B", "C", "z") else v for k, v in made.items()}
            y, state = scan(**part, initial_state=state)
            ys.append(y)
        return torch.cat(ys, 1), state

    assert_same(run(cut, **made), run(scan, **made))


@EITHER
def test_packed_is_one_by_one(scan, arguments, run, assert_same):
    made = arguments(cu_seqlens=[0, 5, 5, 6, 17])

    def one_by_one(initial_state, cu_seqlens, **made):
        results = []
        for i, (start, end) in enumerate([(0, 5), (5, 5), (5, 6), (6, 17)]):
            part = {k: v[:, start:end] if k in ("u", "delta", "B", "C", "z") else v for k, v in made.items()}
            results.append(scan(**part, initial_state=initial_state[i : i + 1]))
        ys, states = zip(*results, strict=True)
        return torch.cat(ys, 1), torch.cat(states)

    assert_same(run(scan, **made), run(one_by_one, **made))


@EITHER
def test_a_neighbour_that_went_wrong_harms_nobody(scan, arguments):
    made = arguments(cu_seqlens=[0, 5, 8, 17])
    y, state = scan(**made)
    made["u"][:, 0], made["B"][:, 1], made["C"][:, 2] = torch.inf, torch.nan, torch.nan
    with_wrong, state_with_wrong = scan(**made)
    assert torch.equal(with_wrong[:, 5:], y[:, 5:])
    assert torch.equal(state_with_wrong[1:], state[1:])
    assert with_wrong[:, :5].isnan().any()


@EITHER
def test_the_future_changes_nothing(scan, arguments):
    made = arguments()
    y, _ = scan(**made)
    made["u"][:, 9:], made["delta"][:, 9:] = 0, 1
    assert torch.equal(scan(**made)[0][:, :9], y[:, :9])


@EITHER
def test_twice_the_same_bits(scan, arguments, assert_repeats):
    assert_repeats(scan, **arguments(torch.float32, l=131))


@EITHER
def test_the_given_state_is_left_alone(scan, arguments):
    made = arguments(l=0)
    _, state = scan(**made)
    assert torch.equal(state, made["initial_state"])
    assert state.data_ptr() != made["initial_state"].data_ptr()


@pytest.mark.parametrize(
    "variant", [{}, {"g": 2}, {"fixed": "BC"}, {"complex": "ABC"}, {"cu_seqlens": [0, 1, 1, 4]}], ids=str
)
def test_gradcheck(variant, arguments):
    made = arguments(b=1, l=4, d=2, n=2, **variant)
    names = [name for name, a in made.items() if isinstance(a, torch.Tensor) and a.dtype != torch.int32]
    rest = {name: a for name, a in made.items() if name not in names}

    def call(*values):
        return REFERENCE(**dict(zip(names, values, strict=True)), **rest)

    torch.autograd.gradcheck(call, [made[name].requires_grad_() for name in names], fast_mode=True)


@EITHER
@pytest.mark.parametrize("case", ["base", "plain", "packed"])
def test_compiles(scan, case, arguments, assert_compiles):
    assert_compiles(scan, **arguments(torch.float32, **CASES[case]))


@pytest.mark.parametrize("case", ["base", "plain", "packed", "length 0", "complex and fixed"])
def test_opcheck_of_the_reference(case, arguments, opcheck):
    names = [
        "u",
        "delta",
        "A",
        "B",
        "C",
        "D",
        "z",
        "delta_bias",
        "delta_softplus",
        "initial_state",
        "cu_seqlens",
    ]
    made = arguments(**(CASES | OF_REFERENCE)[case])
    operator = OPS["selective_scan"].implementation("reference").function.operator
    opcheck(operator, {name: made.get(name) for name in names})


@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 5, 17]])
def test_opcheck_of_tiled(cu_seqlens, arguments, opcheck):
    made = arguments(g=2, cu_seqlens=cu_seqlens)
    operator_arguments = {
        "x": made["u"],
        "dt": made["delta"].abs(),
        **{name: made.get(name) for name in ("A", "B", "C", "initial_state", "cu_seqlens")},
    }
    opcheck(tiled.scan, operator_arguments)


def test_the_step_compiles(arguments):
    made = arguments(torch.float32)
    now = {k: v[:, 0] if k in ("u", "delta", "B", "C", "z") else v for k, v in made.items()}
    state = now.pop("initial_state")
    eager, compiled = state.clone(), state.clone()
    torch._dynamo.reset()
    step = torch.compile(selective_scan_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, **now), selective_scan_step(eager, **now))
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"delta": None}, TypeError, r"`delta` must be a tensor of shape \(b l d\); got NoneType"),
        ({"u": [1.0]}, TypeError, r"`u` must be a tensor of shape \(b l d\); got list"),
        (
            {"delta": torch.zeros(2, 16, 4)},
            ValueError,
            r"`delta` must have shape \(b l d\) with b=2, l=17, d=4; got \(2, 16, 4\)",
        ),
        (
            {"delta": torch.zeros(2, 17, 4, dtype=torch.float64)},
            TypeError,
            "`delta` must be float32, as `u` is; got float64",
        ),
        ({"A": torch.zeros(4, 2)}, ValueError, r"`B` must have shape .* with b=2, l=17, n=2, d=4; got \(2, 17, 3\)"),
        ({"A": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "`A` must be float32 or complex64; got int64"),
        ({"B": torch.zeros(2, 17, 3, 3)}, ValueError, "the 3 groups of `B` and `C` must divide the 4 channels"),
        ({"B": torch.zeros(2, 17, 3, dtype=torch.complex64)}, TypeError, "`B` must be float32; got complex64"),
        ({"C": torch.zeros(17, 3)}, ValueError, r"`C` must have shape \(b l n\) or \(b l g n\) or \(d n\)"),
        ({"D": torch.zeros(4, 1)}, ValueError, r"`D` must have shape \(d\)"),
        ({"initial_state": torch.zeros(1, 4, 3)}, ValueError, r"`initial_state` must have shape \(s d n\) with s=2"),
        ({"initial_state": torch.zeros(2, 4, 3).half()}, TypeError, "`initial_state` must be float32; got float16"),
        ({"z": torch.zeros(2, 17, 4, device="meta")}, ValueError, "`z` must be on cpu, where `u` is; got meta"),
        ({"cu_seqlens": torch.tensor([0, 17], dtype=torch.int32)}, ValueError, "a batch of 2"),
    ],
)
def test_errors(changes, error, match, arguments):
    with pytest.raises(error, match="selective_scan: .*" + match):
        selective_scan(**arguments(torch.float32) | changes)


def test_errors_of_the_step(randn):
    state, u = randn(2, 4, 3), randn(2, 4)
    good = {"u": u, "delta": u, "A": randn(4, 3), "B": randn(2, 3), "C": randn(2, 3)}
    with pytest.raises(ValueError, match=r"`state` must have shape \(b d n\) with b=2, d=4, n=3; got \(2, 3, 4\)"):
        selective_scan_step(state.mT, **good)
    with pytest.raises(TypeError, match="`state` must be float64; got float32"):
        selective_scan_step(state.float(), **good)
