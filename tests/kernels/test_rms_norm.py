from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmkernels import OPS, native, rms_norm, use

CASES = {
    "plain": {},
    "eps": {"eps": 0.5},
    "gate": {"gate": True},
    "gate before": {"gate": True, "norm_before_gate": False},
    "groups": {"group_size": 4},
    "groups of one": {"group_size": 1},
    "groups, gate before": {"group_size": 4, "gate": True, "norm_before_gate": False},
    "residual": {"residual": True},
    "everything": {"residual": True, "gate": True, "group_size": 4, "norm_before_gate": False, "eps": 0.1},
}


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def implementation(request):
    if request.param == "cpu" and native.missing():
        pytest.skip(f"needs the native CPU library: {native.missing()}")
    with use(rms_norm=request.param):
        yield request.param


@pytest.fixture
def arguments(randn):
    def make(dtype=torch.float64, *, shape=(2, 5, 12), residual_dtype=None, gate=False, residual=False, **options):
        made = {"x": randn(*shape, dtype=dtype), "weight": randn(shape[-1], dtype=dtype)}
        if gate:
            made["gate"] = randn(*shape, dtype=dtype)
        if residual:
            made["residual"] = randn(*shape, dtype=residual_dtype or dtype)
        return made | options

    return make


def by_torch(x, weight, *, eps=1e-5, gate=None, norm_before_gate=True, group_size=None, residual=None):
    r = x if residual is None else x + residual
    inside = r if gate is None or norm_before_gate else r * F.silu(gate)
    group_size = group_size or x.shape[-1]
    y = F.rms_norm(inside.unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2) * weight
    y = y * F.silu(gate) if gate is not None and norm_before_gate else y
    return y if residual is None else (y, r)


@pytest.mark.parametrize("case", CASES)
def test_it_is_torchs_norm(case, arguments, run, assert_same):
    made = arguments(**CASES[case])
    assert_same(run(rms_norm, **made), run(by_torch, **made))


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 2, 12), (0, 5, 12), (2, 0, 12)], ids=str)
def test_any_rank(shape, arguments, run, assert_same):
    made = arguments(shape=shape, residual=True)
    assert_same(run(rms_norm, **made), run(by_torch, **made))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_rounds_once(case, dtype, arguments):
    made = arguments(dtype, **CASES[case])
    exact = rms_norm(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in made.items()})
    found = rms_norm(**made)
    if "residual" in made:
        (found, r), (exact, _) = found, exact
        assert torch.equal(r, made["x"] + made["residual"])
        made["x"], made["residual"] = r, torch.zeros_like(r)  # r is normalised as it was rounded
        exact, _ = rms_norm(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in made.items()})
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


def test_a_float32_residual_beside_half_precision(arguments, run):
    made = arguments(torch.bfloat16, residual=True, residual_dtype=torch.float32)
    y, r = rms_norm(**made)
    assert (y.dtype, r.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(r, made["x"].float() + made["residual"])
    assert torch.equal(y, rms_norm(r, made["weight"].float()).bfloat16())
    results = run(rms_norm, **made)
    assert results["gradient of x"].dtype == torch.bfloat16
    assert results["gradient of residual"].dtype == torch.float32


def test_a_float32_weight_beside_half_precision(arguments):
    made = arguments(torch.bfloat16)
    assert torch.equal(rms_norm(**made | {"weight": made["weight"].float()}), rms_norm(**made))


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_any_strides(case, arguments, run, assert_same, spread):
    made = arguments(**CASES[case])
    assert_same(run(rms_norm, **spread(made)), run(rms_norm, **made))


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, arguments):
    made = arguments(shape=(2, 8), **CASES[case])
    names = [name for name, value in made.items() if isinstance(value, torch.Tensor)]
    rest = {name: value for name, value in made.items() if name not in names}

    def call(*values):
        return rms_norm(**dict(zip(names, values, strict=True)), **rest)

    torch.autograd.gradcheck(call, [made[name].requires_grad_() for name in names])


@pytest.mark.parametrize("case", ["plain", "gate before", "everything"])
def test_compiles(case, arguments, assert_compiles):
    assert_compiles(rms_norm, **arguments(torch.float32, **CASES[case]))


@pytest.mark.parametrize("case", ["plain", "gate", "everything"])
@pytest.mark.parametrize("dense", [True, False])
def test_opcheck(case, dense, arguments, opcheck, spread, implementation):
    made = arguments(**CASES[case]) if dense else spread(arguments(**CASES[case]))
    made["x"] = made["x"] if dense else made["x"].transpose(0, 1).contiguous().transpose(0, 1)
    defaults = {"eps": 1e-5, "gate": None, "norm_before_gate": True, "group_size": None, "residual": None}
    function = OPS["rms_norm"].implementation(implementation).function
    if implementation == "cpu":
        opcheck(torch.ops.ssmkernels.rms_norm_cpu.default, defaults | made | {"save": True})
    else:
        opcheck(function.operator, defaults | made)


def test_the_same_bits_on_any_number_of_threads(arguments, run, on_threads):
    made = arguments(torch.float32, shape=(3, 67, 129), gate=True, residual=True)
    one, three = (on_threads(n, lambda: run(rms_norm, **made)) for n in (1, 3))
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": 1.0}, TypeError, r"`x` must be a tensor of shape \(\.\.\. d\); got float"),
        ({"x": torch.tensor(1.0)}, ValueError, r"`x` must have shape \(\.\.\. d\); got \(\)"),
        ({"x": torch.zeros(2, 5, 12, dtype=torch.int32)}, TypeError, "`x` must be float32 or .*; got int32"),
        ({"weight": torch.zeros(5)}, ValueError, r"`weight` must have shape \(d\) with d=12; got \(5,\)"),
        ({"weight": torch.zeros(12).half()}, TypeError, "`weight` must be float32; got float16"),
        (
            {"gate": torch.zeros(2, 6, 12)},
            ValueError,
            r"`gate` must have shape .* with n1=2, n2=5, d=12; got",
        ),
        ({"gate": torch.zeros(2, 5, 12).half()}, TypeError, "`gate` must be float32, as `x` is; got float16"),
        ({"residual": torch.zeros(5, 12)}, ValueError, "`residual` must have shape"),
        ({"residual": torch.zeros(2, 5, 12).half()}, TypeError, "`residual` must be float32; got float16"),
        ({"group_size": 5}, ValueError, "`group_size` must divide the 12 channels of `x`; got 5"),
        ({"group_size": 0}, ValueError, "`group_size` must divide the 12 channels of `x`; got 0"),
    ],
)
def test_errors(changes, error, match, arguments):
    with pytest.raises(error, match="rms_norm: " + match):
        rms_norm(**arguments(torch.float32) | changes)
