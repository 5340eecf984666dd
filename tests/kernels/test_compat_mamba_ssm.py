from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import ssmkernels.compat._scan
from ssmkernels.compat.mamba_ssm import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)

pytestmark = pytest.mark.op("selective_scan", "rms_norm")


def per_channel(t, A, l):
    """B or C as published → (b d n l), or (1 d n l) when fixed."""
    if t.ndim == 2:
        return t[None, ..., None].expand(-1, -1, -1, l)
    if A.is_complex():
        t = torch.complex(t[..., 0::2], t[..., 1::2])
    t = t if t.ndim == 4 else t[:, None]
    return t.repeat_interleave(len(A) // t.shape[1], dim=1)


def formula(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The recurrence in the package's layout, one step after another: y (b d l), h (b d n)."""
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    B, C = (per_channel(t, A, u.shape[2]) for t in (B, C))
    h, ys = torch.zeros(len(u), *A.shape, dtype=A.dtype), []
    for t in range(u.shape[2]):
        h = torch.exp(step[:, :, t, None] * A) * h + (step[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, dim=2)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def double(made):
    """The same arguments in float64 or complex128."""
    tensors = {k: v for k, v in made.items() if isinstance(v, torch.Tensor)}
    return made | {k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in tensors.items()}


# A base case, and what each further one varies.
CASES = {
    "base": {},
    "plain": {"D": False, "z": False, "delta_bias": False, "delta_softplus": False},
    "one token": {"l": 1},
    "one state": {"n": 1},
    "one group": {"g": 1},
    "two groups": {"g": 2},
    "fixed": {"fixed": "BC"},
    "fixed B": {"fixed": "B"},
    "fixed C, groups": {"fixed": "C", "g": 2},
    "complex": {"dtype": torch.complex128},
    "complex, groups": {"dtype": torch.complex128, "g": 2},
    "complex, fixed": {"dtype": torch.complex128, "fixed": "BC"},
    "complex, fixed C": {"dtype": torch.complex128, "fixed": "C"},
}


@pytest.fixture
def arguments(randn):
    def make(*, b=2, d=4, l=9, n=3, g=None, fixed="", dtype=torch.float64, delta_softplus=True, **given):
        timed = (b, n, l) if g is None else (b, g, n, l)
        timed = (*timed[:-1], 2 * l) if dtype.is_complex else timed
        A = -randn(d, n).abs() - 0.1
        made = {
            "u": randn(b, d, l),
            "delta": randn(b, d, l) if delta_softplus else randn(b, d, l).abs(),
            "A": torch.complex(A, randn(d, n)) if dtype.is_complex else A,
            "B": randn(d, n, dtype=dtype) if "B" in fixed else randn(*timed),
            "C": randn(d, n, dtype=dtype) if "C" in fixed else randn(*timed),
            "D": randn(d),
            "z": randn(b, d, l),
            "delta_bias": randn(d),
        }
        return {k: v for k, v in made.items() if given.get(k, True)} | {"delta_softplus": delta_softplus}

    return make


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case, function, arguments, run, assert_same):
    made = arguments(**CASES[case])
    found = run(lambda **a: function(**a, return_last_state=True), **made)
    assert_same(found, run(formula, **made))
    assert torch.equal(function(**made), function(**made, return_last_state=True)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["base", "two groups", "complex", "fixed"])
def test_single_and_half_precision(case, dtype, arguments):
    made = arguments(**CASES[case])
    weights = {"A", "D", "delta_bias"} | ({"B", "C"} if case == "fixed" else set())

    def rounded(name, t):
        if t.is_complex():
            return t.to(torch.complex64)
        return t.float() if name in weights else t.to(dtype)

    narrow = {k: rounded(k, t) if isinstance(t, torch.Tensor) else t for k, t in made.items()}
    y, last = selective_scan_fn(**narrow, return_last_state=True)
    expected, h = formula(**double(narrow))
    assert y.dtype == dtype
    assert last.dtype == (torch.complex64 if case == "complex" else torch.float32)
    assert (y.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    torch.testing.assert_close(last.to(h.dtype), h, rtol=1e-5, atol=1e-5)


def test_weights_of_less_precision_are_widened(arguments):
    made = arguments()
    narrow = made | {name: made[name].float() for name in ("A", "D", "delta_bias")}
    exact = made | {name: narrow[name].double() for name in ("A", "D", "delta_bias")}
    assert torch.equal(selective_scan_fn(**narrow), selective_scan_fn(**exact))


def inner_formula(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
    delta_bias, B_proj_bias, C_proj_bias, delta_softplus, b_rms=None, c_rms=None, dt_rms=None, eps=1e-6,
):  # fmt: skip
    """The block as published, channel-major, every part in PyTorch's own words."""
    l, (d, n), r = xz.shape[2], A.shape, delta_proj_weight.shape[1]
    x, z = xz[:, :d], xz[:, d:]
    x = F.silu(F.conv1d(x, conv1d_weight, conv1d_bias, padding=conv1d_weight.shape[2] - 1, groups=d)[..., :l])
    x_dbl = torch.einsum("bdl,kd->blk", x, x_proj_weight)
    delta = torch.einsum("blr,dr->bdl", x_dbl[..., :r], delta_proj_weight)
    k = 2 * n if A.is_complex() else n

    def norm(t, weight):
        return t if weight is None else t / (t.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def projected(t, bias, weight):  # (b l k) → (b n l), or (b n 2l)
        t = norm(t if bias is None else t + bias, weight)
        return t.mT if k == n else t.unflatten(-1, (n, 2)).movedim(1, 2).flatten(2)

    B = projected(x_dbl[..., r : r + k], B_proj_bias, b_rms) if B is None else B
    C = projected(x_dbl[..., -k:], C_proj_bias, c_rms) if C is None else C
    delta = norm(delta.mT, dt_rms).mT
    y, _ = formula(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


INNER = {
    "base": {},
    "no biases": {"conv1d_bias": None, "out_proj_bias": None, "delta_bias": None},
    "no skip, no softplus": {"D": None, "delta_softplus": False},
    "biases of B and C": {"B_proj_bias": (3,), "C_proj_bias": (3,)},
    "fixed B": {"B": (4, 3)},
    "fixed C": {"C": (4, 3)},
    "both fixed": {"B": (4, 3), "C": (4, 3)},
    "given B": {"B": (2, 3, 7)},
    "complex": {"complex": True},
    "complex, biases": {"complex": True, "B_proj_bias": (6,), "C_proj_bias": (6,)},
    "complex, fixed": {"complex": True, "B": (4, 3), "C": (4, 3)},
    "norms": {"b_rms": (3,), "c_rms": (3,), "dt_rms": (4,), "eps": 0.1},
    "norm of B alone": {"b_rms": (3,)},
}


@pytest.fixture
def inner(randn):
    def make(case, b=2, d=4, l=7, n=3, r=2, w=3, o=5):
        change = dict(INNER[case])
        complex_A = change.pop("complex", False)
        k, A = 2 * n if complex_A else n, -randn(d, n).abs() - 0.1
        maps = torch.complex128 if complex_A else torch.float64
        made = {
            "xz": randn(b, 2 * d, l),
            "conv1d_weight": randn(d, 1, w),
            "conv1d_bias": randn(d),
            "x_proj_weight": randn(r + k * (("B" not in change) + ("C" not in change)), d),
            "delta_proj_weight": randn(d, r),
            "out_proj_weight": randn(o, d),
            "out_proj_bias": randn(o),
            "A": torch.complex(A, randn(d, n)) if complex_A else A,
            "B": None,
            "C": None,
            "D": randn(d),
            "delta_bias": randn(d),
            "B_proj_bias": None,
            "C_proj_bias": None,
            "delta_softplus": True,
        }
        drawn = {
            k: randn(*v, dtype=maps if k in "BC" and len(v) == 2 else torch.float64) if isinstance(v, tuple) else v
            for k, v in change.items()
        }
        return made | drawn

    return make


PUBLISHED = {"b_rms": "b_rms_weight", "c_rms": "c_rms_weight", "dt_rms": "dt_rms_weight", "eps": "b_c_dt_rms_eps"}


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
@pytest.mark.parametrize("case", INNER)
def test_the_block_is_the_formula(case, checkpoint_lvl, inner, run, assert_same):
    made = inner(case)

    def found(**a):
        return mamba_inner_fn(**{PUBLISHED.get(k, k): v for k, v in a.items()}, checkpoint_lvl=checkpoint_lvl)

    expected = run(inner_formula, **made)
    assert_same(run(found, **made), expected)
    if not set(made) & set(PUBLISHED):
        assert_same(run(mamba_inner_ref, **made), expected)


@pytest.mark.parametrize("case", ["base", "norms"])
def test_a_checkpoint_keeps_less_and_changes_no_bit(case, inner, run, monkeypatch):
    made = {PUBLISHED.get(k, k): v for k, v in inner(case).items()}
    calls, conv = [], ssmkernels.compat._scan.causal_conv1d
    monkeypatch.setattr(ssmkernels.compat._scan, "causal_conv1d", lambda *a, **k: calls.append(1) or conv(*a, **k))
    results = {}
    for level in (0, 1):
        calls.clear()
        results[level] = run(lambda **a: mamba_inner_fn(**a, checkpoint_lvl=level), **made)  # noqa: B023
        assert len(calls) == 1 + level
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_a_block_under_autocast(inner):
    made = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inner("base").items()}
    exact = mamba_inner_fn(**made)
    leaves = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = mamba_inner_fn(**leaves | {"xz": leaves["xz"].bfloat16()})
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 0.05 * exact.abs().max()
    y.sum().backward()
    assert all(v.grad.isfinite().all() for v in leaves.values() if isinstance(v, torch.Tensor))


def test_a_block_in_half_precision_with_a_float32_bias(inner):
    made = inner("base")
    wide = ("A", "D", "delta_bias", "out_proj_bias")
    half = {
        k: v.to(torch.float32 if k in wide else torch.bfloat16) if isinstance(v, torch.Tensor) else v
        for k, v in made.items()
    }
    exact = inner_formula(**double(half))
    y = mamba_inner_fn(**half)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 0.05 * exact.abs().max()


def update_formula(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """Published equations with heads: state (b h p n), x, dt, z (b h p), A (h p n), B, C (b g n) → y, new state."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt)[..., None]
    B, C = (t.repeat_interleave(state.shape[1] // t.shape[1], 1)[:, :, None] for t in (B, C))
    new = state * torch.exp(dt * A) + dt * B * x[..., None]
    y = (new * C).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z)), new


@pytest.fixture
def token(randn):
    def make(b=2, h=4, p=3, n=5, g=2):
        return {
            "state": randn(b, h, p, n),
            "x": randn(b, h, p),
            "dt": randn(b, h, p),
            "A": -randn(h, p, n).abs(),
            "B": randn(b, g, n),
            "C": randn(b, g, n),
            "D": randn(h, p),
            "z": randn(b, h, p),
            "dt_bias": randn(h, p),
        }

    return make


def without_heads(made):
    return {k: v.squeeze(0 if k in ("A", "D", "dt_bias") else 1) for k, v in made.items()}


@pytest.mark.parametrize("function", [selective_state_update, selective_state_update_ref])
@pytest.mark.parametrize("given", ["all", "none"])
@pytest.mark.parametrize("heads", [True, False])
def test_a_step_with_heads_and_without(heads, given, function, token):
    made = token() if heads else token(h=1, g=1)
    made = {k: v for k, v in made.items() if given == "all" or k not in ("D", "z", "dt_bias")}
    expected, new = update_formula(**made, dt_softplus=True)
    mine = made if heads else without_heads(made)
    y = function(**mine, dt_softplus=True)
    torch.testing.assert_close(y, expected if heads else expected[:, 0])
    torch.testing.assert_close(mine["state"], new if heads else new[:, 0])


def test_one_number_for_a_head(token):
    """As Mamba-2 decodes: A, dt, D and dt_bias expanded over the channels of a head."""
    made = token()
    made |= {k: made[k][..., :1].expand_as(made[k]) for k in ("dt", "D", "dt_bias")}
    made["A"] = made["A"][:, :1, :1].expand_as(made["A"])
    expected, new = update_formula(**made, dt_softplus=True)
    torch.testing.assert_close(selective_state_update(**made, dt_softplus=True), expected)
    torch.testing.assert_close(made["state"], new)


def test_a_state_that_is_no_block_of_memory(token):
    made = token()
    expected, new = update_formula(**made)
    made["state"] = made["state"].mT.contiguous().mT
    torch.testing.assert_close(selective_state_update(**made), expected)
    torch.testing.assert_close(made["state"], new)


@pytest.mark.parametrize("heads", [True, False])
def test_rows_of_a_cache(heads, token, randn):
    made = token(b=3) if heads else without_heads(token(b=3, h=1, g=1))
    rows = torch.tensor([4, -1, 1], dtype=torch.int32)
    cache = randn(6, *made["state"].shape[1:])
    before, whole = cache.clone(), cache[rows.long()].clone()
    y = selective_state_update(**made | {"state": cache}, state_batch_indices=rows)
    expected = selective_state_update(**made | {"state": whole})
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    assert not y[1].any()
    assert torch.equal(cache[[4, 1]], whole[[0, 2]])
    assert torch.equal(cache[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_in_half_precision(state, token):
    wide = ("A", "dt_bias")  # as checkpoints keep them
    made = {k: v.to(torch.float32 if k in wide else torch.bfloat16) for k, v in token().items()}
    made["state"] = made["state"].to(state)
    expected, new = update_formula(**double(made), dt_softplus=True)
    y = selective_state_update(**made, dt_softplus=True)
    assert y.dtype == torch.bfloat16
    assert made["state"].dtype == state
    assert (y - expected).abs().max() <= torch.finfo(y.dtype).eps * expected.abs().max()
    assert (made["state"] - new).abs().max() <= 4 * torch.finfo(state).eps * new.abs().max()


def test_a_step_has_gradients(token, run, assert_same):
    def found(state, **others):
        state = state.clone()
        return selective_state_update(state, **others, dt_softplus=True), state

    made = token()
    assert_same(run(found, **made), run(lambda **a: update_formula(**a, dt_softplus=True), **made))


def test_they_compile(arguments, inner, assert_compiles):
    assert_compiles(lambda **a: selective_scan_fn(**a, return_last_state=True), **arguments(g=2))
    assert_compiles(mamba_inner_fn, **{PUBLISHED.get(k, k): v for k, v in inner("norms").items()})


@pytest.mark.parametrize(
    ("function", "published"),
    [
        (
            selective_scan_fn,
            "(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False)",
        ),
        (
            mamba_inner_fn,
            "(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, "
            "B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, "
            "checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06)",
        ),
        (
            selective_state_update,
            "(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None)",
        ),
    ],
)
def test_signatures_are_those_of_the_package(function, published):
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == published


ERRORS = {
    "time-major delta": (
        lambda r: {"delta": r(2, 9, 4)},
        ValueError,
        r"selective_scan_fn: `delta` must have .*\(b d l\)",
    ),
    "B of a complex A": (lambda r: {"A": r(4, 3) + 0j}, ValueError, r"`B` must .*\(b n 2l\).* l=9; got \(2, 3, 9\)"),
    "C as of a complex A": (lambda r: {"C": r(2, 3, 18)}, ValueError, r"`C` must have shape \(d n\) or \(b n l\)"),
    "groups": (lambda r: {"B": r(2, 3, 3, 9), "C": r(2, 3, 3, 9)}, ValueError, "3 groups .* 4 channels"),
    "no tensor": (lambda r: {"A": 1.0}, TypeError, "`A` must be a tensor"),
    "no B": (lambda r: {"B": None}, TypeError, "`B` must be a tensor"),
    "a flag": (lambda r: {"return_last_state": 1}, TypeError, "`return_last_state` must be a bool"),
    "integers": (lambda r: {"D": torch.ones(4).int()}, TypeError, "`D` must be"),
    "integers as inputs": (lambda r: {"u": torch.ones(2, 4, 9).int()}, TypeError, "`u` must be .*; got int32"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_scan(case, arguments, randn):
    change, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        selective_scan_fn(**arguments() | change(randn))


INNER_ERRORS = {
    "checkpoint_lvl": (lambda r: {"checkpoint_lvl": 2}, "`checkpoint_lvl` must be 0 or 1; got 2"),
    "a bias of what is given": (
        lambda r: {"B": r(4, 3), "B_proj_bias": r(3)},
        "`B_proj_bias` belongs to a projected `B`",
    ),
    "a norm of what is fixed": (
        lambda r: {"C": r(4, 3), "c_rms_weight": r(3)},
        "no `c_rms_weight` with a `C` that is fixed",
    ),
    "a norm beside complex A": (
        lambda r: {"A": r(4, 3) + 0j, "x_proj_weight": r(14, 4), "b_rms_weight": r(3)},
        "no `b_rms_weight` with complex `A`",
    ),
    "too few rows": (lambda r: {"x_proj_weight": r(7, 4)}, "`x_proj_weight` must have 8 rows here"),
    "an odd xz": (lambda r: {"xz": r(2, 7, 5)}, r"`xz` must have shape \(b 2d l\) with d=4"),
    "a flat convolution": (lambda r: {"conv1d_weight": r(4, 3)}, r"`conv1d_weight` must have shape \(d 1 w\)"),
    "a norm's weight": (lambda r: {"dt_rms_weight": r(2)}, r"`dt_rms_weight` must have shape \(d\) with d=4"),
}


@pytest.mark.parametrize("case", INNER_ERRORS)
def test_errors_of_the_block(case, inner, randn):
    change, message = INNER_ERRORS[case]
    with pytest.raises(ValueError, match=f"mamba_inner_fn: .*{message}"):
        mamba_inner_fn(**inner("base") | change(randn))


def test_errors_of_a_step(token, randn):
    made = token()
    with pytest.raises(ValueError, match="selective_state_update: the 3 groups .* must divide the 4 heads"):
        selective_state_update(**made | {"B": randn(2, 3, 5), "C": randn(2, 3, 5)})
    with pytest.raises(ValueError, match=r"`x` must have shape \(b h p\)"):
        selective_state_update(**made | {"x": randn(2, 3)})
    with pytest.raises(ValueError, match="`state` must have shape"):
        selective_state_update(**made | {"state": randn(2, 3)})
    with pytest.raises(TypeError, match="`x` must be .*; got int64"):
        selective_state_update(**made | {"x": made["x"].long()})
    with pytest.raises(TypeError, match="`state_batch_indices` must be int32 or int64"):
        selective_state_update(**made, state_batch_indices=torch.zeros(2))
