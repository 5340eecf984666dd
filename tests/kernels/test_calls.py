"""Native calls that are written as a layer reads: what each computes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ssmkernels
from ssmkernels import native
from ssmkernels.native.calls import FUNCTIONS, Calls, NotPreparedError
from ssmkernels.native.prepared import Program
from ssmkernels.ops.decode_attention.token import attend

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")

MEANT = {
    "identity": lambda x: x,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "log_sigmoid": F.logsigmoid,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "heavy_tail": lambda x: x.clamp(min=0) + 1 / (1 - x.clamp(max=0)),
    "finite_exp": lambda x: torch.exp(x.clamp(max=88.0)),
}


def run(calls):
    with torch.no_grad():
        Program(calls.made).run()
    return calls.made[-1].result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations(function, dtype):
    torch.manual_seed(0)
    scales = torch.tensor([1e-3, 1.0, 30.0], dtype=dtype)
    x = torch.randn(3, 77, dtype=dtype)[:, :71] * scales[:, None]  # rows of a wider tensor, in no whole vectors
    bias, factor = torch.randn(71, dtype=dtype), torch.randn(3, 142, dtype=dtype)[:, 71:]
    expected = 0.3 * MEANT[function]((x + bias).double()).clamp(min=-0.7) * factor.double()
    calls = Calls()
    calls.activated(x, function, bias=bias, least=-0.7, scale=0.3, factor=factor)
    found = run(calls).double()
    assert ((found - expected).abs() <= 16 * torch.finfo(dtype).eps * (expected.abs() + factor.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, 13])
def test_rows_of_parameters_serve_those_of_x_in_turn(columns, dtype):
    torch.manual_seed(0)
    x, addend = torch.randn(6, 26, dtype=dtype)[:, ::2].contiguous(), torch.randn(6, 20, dtype=dtype)[:, 7:]
    bias, factor = torch.randn(3, 13, dtype=dtype), torch.randn(2, 2 * columns, dtype=dtype)[:, columns:]
    calls = Calls()
    calls.activated(x, "tanh", bias=bias, slope=0.4, scale=1.5, factor=factor, addend=addend)
    expected = 1.5 * torch.tanh(0.4 * (x + bias.repeat(2, 1))) * factor.repeat(3, 1) + addend
    assert torch.allclose(run(calls), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.abs().max()))


@pytest.mark.parametrize("p", [3, 16, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_and_sums_of_heads(dtype, p):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(2, 5, p, dtype=dtype) + 3,
        torch.randn(5 * p, dtype=dtype),
        torch.randn(5 * p, dtype=dtype),
    )
    for centred, given in ((False, None), (True, bias), (False, bias)):
        calls = Calls()
        calls.head_norm(x, weight, given, eps=0.1, centred=centred)
        expected = F.layer_norm(x, (p,), eps=0.1).flatten(1) * (weight + centred) + (0 if given is None else given)
        assert torch.allclose(run(calls), expected, rtol=0, atol=64 * torch.finfo(dtype).eps)
    calls = Calls()
    calls.head_sum(x, weight.view(5, p))
    expected = (x * weight.view(5, p)).sum(-1)
    assert torch.allclose(run(calls), expected, rtol=0, atol=8 * p * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("half", [1, 8, 11])
def test_rotation_by_a_position_that_is_counted(half, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 4 * half, dtype=dtype)[:, : 2 * half].view(2, 1, 2 * half)
    positions, frequency = torch.tensor([0, 70_000], dtype=torch.int32), torch.rand(half, dtype=dtype)
    calls = Calls()
    turned = calls.rotary(x, positions, frequency)
    calls.count(positions)
    for _ in range(3):
        angle = (positions[:, None, None] * frequency).double()
        first, second = x.double().chunk(2, dim=-1)
        sine, cosine = angle.sin(), angle.cos()
        expected = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
        run(calls)
        assert torch.allclose(turned.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert positions.tolist() == [3, 70_003]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    """One rounding of the result, and parameters that a kernel reads in float32 alone are converted at each call."""
    torch.manual_seed(0)
    x, bias, factor = (torch.randn(3, 9).to(dtype) for _ in range(3))
    calls = Calls()
    with torch.no_grad():
        calls.activated(x, "silu", bias=bias[0], factor=factor)
        expected = (F.silu(x.float() + bias[0].float()) * factor.float()).to(dtype)
        assert torch.allclose(run(calls), expected, rtol=torch.finfo(dtype).eps)
        weight = torch.rand(9).to(dtype)
        calls.op(ssmkernels.rms_norm, x, weight)
        weight.mul_(2)
        assert [call.kernel for call in calls.made] == ["activate", "widen", "rms_norm"]
        assert torch.equal(run(calls), ssmkernels.rms_norm(x, weight))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations_of_the_largest_numbers(function):
    large = torch.finfo(torch.float32).max ** 0.5 / 4
    x = torch.tensor([[-math.inf, -large, 0.0, large, math.inf]])
    calls = Calls()
    found, expected = (calls.activated(x, function), run(calls))[0], MEANT[function](x.double()).float()
    allowed = 1e-6 * expected.abs().nan_to_num(posinf=1.0)
    same = (found == expected) | ((found - expected).abs() <= allowed) | (found.isnan() & expected.isnan())
    assert same[0, 1:4].all()
    if function not in ("silu", "gelu_tanh"):  # of which PyTorch's are NaN at -inf
        assert same.all()


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - {"softplus", "log_sigmoid"}))
def test_not_a_number_stays_so(function):
    calls = Calls()
    calls.activated(torch.full((1, 3), math.nan), function, least=0.0)
    assert run(calls).isnan().all()


def test_calls_read_what_was_written_before_them():
    torch.manual_seed(0)
    x, first, second, bias = torch.randn(2, 9), torch.randn(14, 9), torch.randn(3, 7), torch.randn(3)
    norm = torch.rand(7)
    calls, result = Calls(), torch.empty(2, 3)
    with torch.no_grad():
        a, b = calls.linear(x, first).chunk(2, dim=-1)
        inside = calls.op(ssmkernels.rms_norm, calls.activated(a, "silu", factor=b), norm)
        calls.linear(inside, second, bias)
        calls.into(result)
    for _ in range(2):
        x.normal_()
        a, b = F.linear(x, first).chunk(2, dim=-1)
        run(calls)
        expected = F.linear(ssmkernels.rms_norm(F.silu(a) * b, norm), second, bias)
        assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_what_native_calls_cannot_do_is_not_prepared():
    calls, x, weight = Calls(), torch.randn(2, 6), torch.randn(5, 6)
    for refused in (
        lambda: calls.linear(x.bfloat16(), weight.bfloat16()),
        lambda: calls.linear(x, weight.double()),
        lambda: calls.linear(torch.randn(native.FEW + 1, 6), weight),
        lambda: calls.linear(torch.randn(2, 12)[:, ::2], weight),
        lambda: calls.linear(x, torch.randn(6, 5).t()),
        lambda: calls.activated(x, "gelu"),
        lambda: calls.activated(x.half(), "silu", bias=torch.ones(6)),
        lambda: calls.head_norm(torch.randn(2, 3, 4).transpose(1, 2), None, eps=1.0),
        lambda: calls.head_sum(torch.randn(2, 3, 4), torch.randn(3, 4).double()),
        lambda: calls.rotary(torch.randn(2, 4, 3).mT, torch.zeros(2, dtype=torch.int32), torch.ones(2)),
        lambda: calls.rotary(torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.int64), torch.ones(2)),
        lambda: calls.count(torch.zeros(2, dtype=torch.int64)),
        lambda: calls.widened(x),
        lambda: calls.widened(torch.randn(6, 2).half().t()),
        lambda: calls.activated(x, "silu", factor=torch.randn(6, 2).t()),
        lambda: calls.op(ssmkernels.rms_norm, torch.randn(6, 2).t(), torch.ones(6)),
        lambda: calls.op(ssmkernels.rms_norm, x, torch.ones(6), implementation="reference"),
    ):
        with torch.no_grad(), pytest.raises(NotPreparedError):
            refused()
    assert not calls.made


def into(calls, result):
    calls.activated(torch.randn(2, 6))
    try:
        calls.into(result)
    finally:
        calls.made.clear()


def test_shapes_that_do_not_fit_are_not_prepared():
    """A fault: kernels read and wrote beyond the tensors, as they go by addresses."""
    calls, x, heads, ones = Calls(), torch.randn(2, 6), torch.randn(2, 3, 4), torch.ones
    positions = torch.zeros(2, dtype=torch.int32)
    for refused in (
        lambda: calls.linear(x, ones(5, 4)),
        lambda: calls.linear(x, ones(5, 8)),
        lambda: calls.linear(x, ones(5, 6), ones(1)),
        lambda: calls.activated(x, bias=ones(1)),
        lambda: calls.activated(x, bias=ones(3, 6)),
        lambda: calls.activated(x, bias=ones(0, 6)),
        lambda: calls.activated(x, bias=ones(1, 2, 6)),
        lambda: calls.activated(x, factor=ones(2, 3)),
        lambda: calls.activated(x, factor=ones(6)),
        lambda: calls.activated(x, factor=ones(3, 1)),
        lambda: calls.activated(x, addend=ones(1, 6)),
        lambda: calls.activated(x, addend=ones(2, 1)),
        lambda: calls.head_norm(heads, ones(4), eps=1.0),
        lambda: calls.head_norm(heads, ones(12), ones(3), eps=1.0),
        lambda: calls.head_sum(heads, ones(4)),
        lambda: calls.rotary(heads, positions[:1], ones(2)),
        lambda: calls.rotary(heads, positions, ones(3)),
        lambda: into(calls, ones(2, 5)),
        lambda: into(calls, ones(6)),
        lambda: into(calls, ones(2, 6).double()),
    ):
        with torch.no_grad(), pytest.raises(NotPreparedError):
            refused()
    assert not calls.made


def test_attention_of_shapes_that_do_not_fit_is_not_prepared():
    q, kv = torch.randn(2, 4, 8), torch.randn(2, 2, 8)
    fitting = {"q": q, "k": kv, "v": kv, "frequency": torch.ones(4), "slopes": torch.ones(4), "sinks": torch.ones(4)}
    rest = {"left": -1, "scale": 1.0, "softcap": 0.0}
    calls = Calls()
    attend(calls, **fitting, **rest)
    count = len(calls.made)
    for change in (
        {"q": torch.randn(2, 5, 8)},
        {"q": torch.randn(2, 4, 6)},
        {"k": torch.randn(2, 1, 8)},
        {"k": torch.randn(1, 2, 8)},
        {"v": torch.randn(2, 4, 8)},
        {"v": torch.randn(2, 0, 8)},
        {"frequency": torch.ones(5)},
        {"frequency": torch.ones(1, 4)},
        {"slopes": torch.ones(1)},
        {"sinks": torch.ones(2, 2)},
        {"scale": math.nan},
        {"softcap": -1.0},
    ):
        with pytest.raises(NotPreparedError):
            attend(calls, **fitting | rest | change)
    assert len(calls.made) == count
