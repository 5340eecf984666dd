from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from convolution_inputs import convolution_inputs

from ssmkernels import OPS, causal_conv1d, causal_conv1d_step

# A base case, and what each further one varies.
CASES = {
    "base": {},
    "plain": {"bias": False, "activation": None, "initial_state": False},
    "width 1": {"w": 1},
    "width 2": {"w": 2},
    "wider than long": {"w": 7, "l": 3},
    "length 1": {"l": 1},
    "length 0": {"l": 0},
    "one channel": {"d": 1},
    "empty batch": {"b": 0},
    "packed": {"cu_seqlens": [0, 5, 5, 6, 17, 17]},
    "packed, no initial state": {"cu_seqlens": [0, 0, 1, 17], "initial_state": False},
    "packed, width 1": {"cu_seqlens": [0, 3, 17], "w": 1},
    "packed, nothing": {"cu_seqlens": [0, 0, 0], "l": 0},
}


@pytest.fixture
def arguments(randn):
    def make(dtype=torch.float64, *, b=2, l=17, d=3, w=4, activation="silu", cu_seqlens=None, **given):
        b = b if cu_seqlens is None else 1
        made = convolution_inputs(randn, dtype, b=b, l=l, d=d, w=w, cu_seqlens=cu_seqlens)
        made = {name: value for name, value in made.items() if given.get(name, True)}
        return made | {"activation": activation, "return_final_state": True}

    return make


def by_torch(x, weight, bias=None, activation=None, *, initial_state=None, return_final_state, cu_seqlens=None):
    """The convolution of PyTorch, one sequence after another; both results."""
    w = weight.shape[1]
    borders = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ys, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(borders)):
        part = x[:, start:end].mT
        if initial_state is None:
            part = F.pad(part, (w - 1, 0))
        else:
            before = initial_state if cu_seqlens is None else initial_state[i : i + 1]
            part = torch.cat([before.mT, part], dim=-1)
        y = F.conv1d(part, weight[:, None], bias, groups=x.shape[2]) if end > start else part[..., :0]
        ys.append(F.silu(y).mT if activation else y.mT)
        states.append(part[..., part.shape[-1] - w + 1 :].mT)
    return torch.cat(ys, dim=1), torch.cat(states)


@pytest.mark.parametrize("case", CASES)
def test_it_is_torchs_convolution(case, arguments, run, assert_same):
    made = arguments(**CASES[case])
    assert_same(run(causal_conv1d, **made), run(by_torch, **made))


def test_half_precision_sums_in_float32(arguments):
    made = arguments(torch.bfloat16)
    y, state = causal_conv1d(**made)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = causal_conv1d(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in made.items()})
    assert (y.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert torch.equal(state, made["x"][:, -3:].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_may_be_float32(dtype, arguments, run):
    made = arguments(dtype)
    wide = made | {"weight": made["weight"].float()}
    found, expected = run(causal_conv1d, **wide), run(causal_conv1d, **made)
    assert torch.equal(found["output 0"], expected["output 0"])
    assert found["gradient of weight"].dtype == torch.float32
    assert found["gradient of x"].dtype == dtype


@pytest.mark.parametrize("case", ["base", "packed"])
def test_any_strides(case, arguments, run, assert_same, spread):
    made = arguments(**CASES[case])
    assert_same(run(causal_conv1d, **spread(made)), run(causal_conv1d, **made))


@pytest.mark.parametrize("case", ["base", "width 1", "wider than long"])
def test_step_by_step_is_at_once(case, arguments):
    made = arguments(**CASES[case])
    y, final_state = causal_conv1d(**made)
    state = made["initial_state"].clone()
    for t in range(y.shape[1]):
        step = causal_conv1d_step(state, made["x"][:, t], made["weight"], made["bias"], made["activation"])
        torch.testing.assert_close(step, y[:, t])
    assert torch.equal(state, final_state)


def test_cut_is_whole(arguments, run, assert_same):
    def cut(x, initial_state, **rest):
        ys, state = [], initial_state
        for time in (slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 17)):
            y, state = causal_conv1d(x[:, time], **rest, initial_state=state)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    made = arguments()
    assert_same(run(cut, **made), run(causal_conv1d, **made))


def test_the_future_changes_nothing(arguments):
    made = arguments()
    y, _ = causal_conv1d(**made)
    made["x"][:, 9:] = torch.nan
    assert torch.equal(causal_conv1d(**made)[0][:, :9], y[:, :9])


def test_the_final_state_comes_only_when_asked_for(arguments):
    made = arguments()
    y, _ = causal_conv1d(**made)
    assert torch.equal(causal_conv1d(**made | {"return_final_state": False}), y)


def test_the_given_state_is_left_alone(arguments):
    made = arguments(l=0)
    _, state = causal_conv1d(**made)
    assert torch.equal(state, made["initial_state"])
    assert state.data_ptr() != made["initial_state"].data_ptr()


@pytest.mark.parametrize("case", ["base", "packed"])
def test_gradcheck(case, arguments):
    made = arguments(**CASES[case])
    names = ["x", "weight", "bias", "initial_state"]
    rest = {name: a for name, a in made.items() if name not in names}
    values = [made[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(lambda *v: causal_conv1d(**dict(zip(names, v, strict=True)), **rest), values)


@pytest.mark.parametrize("case", ["base", "plain", "packed"])
def test_compiles(case, arguments, assert_compiles):
    assert_compiles(causal_conv1d, **arguments(torch.float32, **CASES[case]))


@pytest.mark.parametrize("case", ["base", "plain", "width 1", "length 0", "packed"])
def test_opcheck(case, arguments, opcheck):
    made = arguments(**CASES[case])
    names = ["x", "weight", "bias", "activation", "initial_state", "cu_seqlens"]
    operator = OPS["causal_conv1d"].implementation("reference").function.operator
    opcheck(operator, {name: made.get(name) for name in names})


def test_the_step_compiles(randn):
    state, x, weight = randn(2, 3, 5), randn(2, 5), randn(5, 4)
    eager, compiled = state.clone(), state.clone()
    torch._dynamo.reset()
    step = torch.compile(causal_conv1d_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, x, weight), causal_conv1d_step(eager, x, weight))
    assert torch.equal(compiled, eager)
    assert torch.equal(eager, torch.cat([state[:, 1:], x[:, None]], dim=1))


def test_the_step_has_gradients(randn):
    state, x, weight = randn(2, 3, 5), randn(2, 5).requires_grad_(), randn(5, 4).requires_grad_()
    causal_conv1d_step(state, x, weight, activation="silu").sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": None}, TypeError, "`x` must be a tensor"),
        ({"x": torch.zeros(17, 3)}, ValueError, r"`x` must have shape \(b l d\); got \(17, 3\)"),
        ({"x": torch.zeros(2, 17, 3, dtype=torch.int64)}, TypeError, "`x` must be float32 or .*; got int64"),
        ({"weight": torch.zeros(3, 1, 4)}, ValueError, r"`weight` must have shape \(d w\) .*; got \(3, 1, 4\)"),
        ({"weight": torch.zeros(3, 0)}, ValueError, r"`weight` \(d w\) must be at least 1 wide; got \(3, 0\)"),
        ({"weight": torch.zeros(3, 4).half()}, TypeError, "`weight` must be float32; got float16"),
        ({"bias": torch.zeros(4)}, ValueError, r"`bias` must have shape \(d\) with d=3; got \(4,\)"),
        ({"activation": "relu"}, ValueError, "`activation` must be None or 'silu'; got 'relu'"),
        ({"initial_state": torch.zeros(2, 4, 3)}, ValueError, r"shape \(s w-1 d\) with s=2, w=4, d=3; got \(2, 4, 3\)"),
        ({"initial_state": torch.zeros(2, 3, 3).half()}, TypeError, "`initial_state` must be float32; got float16"),
        ({"cu_seqlens": torch.tensor([0, 17])}, TypeError, "`cu_seqlens` must be an int32 tensor; got torch.int64"),
    ],
)
def test_errors(changes, error, match, arguments):
    with pytest.raises(error, match="causal_conv1d: .*" + match):
        causal_conv1d(**arguments(torch.float32) | changes)


def test_errors_of_the_step(randn):
    with pytest.raises(ValueError, match=r"`state` must have shape \(b w-1 d\) .* b=2, .*; got \(2, 4, 5\)"):
        causal_conv1d_step(randn(2, 4, 5), randn(2, 5), randn(5, 4))
    with pytest.raises(TypeError, match="`state` must be float64; got float32"):
        causal_conv1d_step(randn(2, 3, 5).float(), randn(2, 5), randn(5, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [256, 70])
def test_results_in_half_precision_are_the_nearest(d, dtype):
    """Of one tap they are products, exact in float32; many lie in the middle between two in half precision."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 50, d).mul(8).to(dtype), torch.zeros(d, 4)
    weight[:, 3] = torch.randn(d).to(dtype)
    x[0, 3, :2], x[1, 7, 1] = torch.tensor([torch.inf, torch.finfo(dtype).max]), -torch.inf
    weight[1, 3] = 2.0
    found = causal_conv1d(x, weight.to(dtype), implementation="cpu")
    expected = (x.float() * weight[:, 3]).to(dtype)
    reached = torch.ones_like(x, dtype=torch.bool)  # other taps of 0 times infinity are no numbers
    reached[0, 4:7, 0] = reached[1, 8:11, 1] = False
    assert torch.equal(found[reached], expected[reached])
    assert found[~reached].isnan().all()
