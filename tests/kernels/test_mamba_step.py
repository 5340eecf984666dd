from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from ssmkernels import causal_conv1d, explain, gated_deltanet_step, mamba2_step, mamba_step, native, selective_scan
from ssmkernels.check.spec import spec_of

STATES = ("conv_state", "ssm_state")
needs_native = pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}")


@pytest.fixture
def arguments():
    def make(dtype=torch.float32, **case):
        spec = spec_of("mamba_step")
        return spec.inputs(spec.case(case), dtype, "cpu", seed=0)

    return make


def step(made, **options):
    """y and the two states, of copies."""
    own = {name: v.clone() if name in STATES else v for name, v in made.items()}
    return mamba_step(**own, **options), *(own[name] for name in STATES)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 16, 17])
@pytest.mark.parametrize("width", [1, 4])
def test_rows_that_share_a_tile_get_the_bits_that_each_gets_alone(dtype, n, width, arguments):
    made = arguments(dtype, b=19, m=7, d=70, n=n, r=4, w=width)
    y, *states = step(made, implementation="cpu")
    per_row = ("x", *STATES)
    for row in range(19):
        alone = {name: v[row : row + 1].contiguous() if name in per_row else v for name, v in made.items()}
        for together, own in zip((y, *states), step(alone, implementation="cpu"), strict=True):
            assert torch.equal(together[row : row + 1], own)


@pytest.mark.parametrize("implementation", ["cpu", "steps", "reference"])
@pytest.mark.parametrize("norm_eps", [None, 1e-3])
def test_tokens_one_by_one_are_the_whole(implementation, norm_eps, arguments, assert_close64):
    if implementation == "cpu" and native.missing():
        pytest.skip(f"needs the native CPU library: {native.missing()}")
    made = arguments(torch.float64, b=3, m=7, d=70, n=5, r=4, norm_eps=norm_eps)
    torch.manual_seed(0)
    inputs = torch.randn(3, 9, 7, dtype=torch.float64)
    states = {name: made[name].clone() for name in STATES}
    rest = {name: v for name, v in made.items() if name not in (*STATES, "x")}
    ys = [mamba_step(**states, x=inputs[:, t], **rest, implementation=implementation) for t in range(9)]

    x, z = F.linear(inputs, made["in_proj"], made["in_bias"]).chunk(2, dim=-1)
    u, conv = causal_conv1d(
        x, made["conv_weight"], made["conv_bias"], "silu", initial_state=made["conv_state"], return_final_state=True
    )
    dt, B, C = F.linear(u, made["x_proj"]).split([4, 5, 5], dim=-1)
    if norm_eps is not None:
        dt, B, C = (F.rms_norm(t, t.shape[-1:], eps=norm_eps) for t in (dt, B, C))
    y, ssm = selective_scan(
        u,
        F.linear(dt, made["dt_proj"]),
        -made["A_log"].exp(),
        B,
        C,
        made["D"],
        z,
        made["dt_bias"],
        True,
        initial_state=made["ssm_state"],
        return_final_state=True,
    )
    assert_close64(torch.stack(ys, dim=1), F.linear(y, made["out_proj"], made["out_bias"]))
    assert_close64(states["conv_state"], conv)
    assert_close64(states["ssm_state"], ssm)


@pytest.fixture
def assert_close64():
    return functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


@needs_native
@pytest.mark.parametrize("b", [1, 3, 8])
def test_the_same_bits_on_any_number_of_threads_and_in_any_company(b, arguments, on_threads):
    made = arguments(b=b, m=150, d=330, n=16, r=20)
    one, three = (on_threads(n, step, made, implementation="cpu") for n in (1, 3))
    assert all(torch.equal(p, q) for p, q in zip(one, three, strict=True))
    last = {name: v[-1:] if name in (*STATES, "x") else v for name, v in made.items()}
    assert all(torch.equal(p[-1:], q) for p, q in zip(one, step(last, implementation="cpu"), strict=True))


@needs_native
def test_it_runs_natively_without_gradients_alone(arguments):
    made = arguments()
    assert explain(mamba_step, **made).chosen == "cpu"
    made["D"] = made["D"].requires_grad_()
    found = explain(mamba_step, **made)
    assert found.chosen == "steps"
    assert "no gradient" in found.reasons["cpu"]
    with torch.no_grad():
        assert explain(mamba_step, **made).chosen == "cpu"
        more = arguments(b=native.FEW + 1)  # a matrix product reads each weight once for all
        assert explain(mamba_step, **more).chosen == "steps"


@needs_native
@torch.no_grad()
def test_opcheck_and_compile(arguments):
    made = arguments()
    explain(mamba_step, **made)  # imports the implementations
    torch.library.opcheck(torch.ops.ssmkernels.mamba_step_cpu.default, (*made.values(), False))
    compiled = torch.compile(mamba_step, fullgraph=True, backend="aot_eager")
    own = {name: v.clone() if name in STATES else v for name, v in made.items()}
    y = compiled(**own)
    for found, wanted in zip((y, own["conv_state"], own["ssm_state"]), step(made), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"`out_proj` must have shape \(m d\) with m=4, d=6; got \(5, 6\)"),
        (
            {"in_proj": torch.zeros(11, 5)},
            ValueError,
            r"`in_proj` must have shape \(2d m\) with d=6, m=5; got \(11, 5\)",
        ),
        ({"in_proj": None}, TypeError, "`in_proj` must be a tensor"),
        ({"in_bias": torch.zeros(6)}, ValueError, r"`in_bias` must have shape \(2d\) with d=6; got \(6,\)"),
        ({"out_bias": torch.zeros(5).half()}, TypeError, "`out_bias` must be float32, as `x` is; got float16"),
        (
            {"x_proj": torch.zeros(10, 6)},
            ValueError,
            r"`x_proj` must have shape \(r\+2n d\) with r=3, n=4, d=6; got \(10, 6\)",
        ),
        ({"x_proj": None}, TypeError, "`x_proj` must be a tensor"),
        ({"conv_state": torch.zeros(2, 4, 6)}, ValueError, r"`conv_state` must have shape \(b w-1 d\)"),
        ({"ssm_state": torch.zeros(2, 6, 4).double()}, TypeError, "`ssm_state` must be float32; got float64"),
        ({"dt_proj": torch.zeros(6, 3).half()}, TypeError, "`dt_proj` must be float32, as `x` is; got float16"),
        ({"A_log": torch.zeros(6, 4).bfloat16()}, TypeError, "`A_log` must be float32; got bfloat16"),
        ({"norm_eps": "small"}, TypeError, "`norm_eps` must be a number or None; got str"),
        ({"norm_eps": [1e-5]}, TypeError, "`norm_eps` must be a number or None; got list"),
    ],
)
def test_errors(changes, error, match, arguments):
    made = arguments()
    step(made)  # what passed once is not checked again
    with pytest.raises(error, match="mamba_step: " + match):
        step(made | changes)


def test_what_passed_once_is_told_from_what_only_equals_it(arguments):
    made = arguments(norm_eps=1)
    step(made)
    with pytest.raises(TypeError, match="`norm_eps` must be a number or None; got bool"):
        step(made | {"norm_eps": True})
    with pytest.raises(TypeError, match="`D` must be a dense tensor; got layout torch.sparse_coo"):
        step(made | {"D": made["D"].to_sparse()})


@pytest.mark.parametrize("op", [mamba_step, mamba2_step, gated_deltanet_step])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@needs_native
def test_a_sequence_does_not_depend_on_the_others(op, dtype):
    """Many sequences share each read of the weights, and get the bits that they get alone."""
    spec = spec_of(op.__name__)
    made = spec.inputs(spec.case({"b": native.FEW, "m": 37}), dtype, "cpu", seed=0)
    with torch.no_grad():
        assert explain(op, **made).chosen == "cpu"
        batched = [name for name, t in made.items() if name == "x" or "state" in name]
        states = [name for name in batched if name != "x"]
        before = {name: made[name].clone() for name in batched}
        for count in (2, 3, 5, 8, 16, 19, native.FEW):
            own = {**made, **{name: before[name][:count].clone() for name in batched}}
            y = op(**own)
            for i in (0, count // 2, count - 1):
                alone = {**made, **{name: before[name][i : i + 1].clone() for name in batched}}
                assert torch.equal(op(**alone), y[i : i + 1])
                assert all(torch.equal(alone[name], own[name][i : i + 1]) for name in states)
