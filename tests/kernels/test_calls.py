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
    "exp": torch.exp,
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
        lambda: calls.linear(torch.randn(9, 6), weight),
        lambda: calls.linear(torch.randn(2, 12)[:, ::2], weight),
        lambda: calls.linear(x, torch.randn(6, 5).t()),
        lambda: calls.activated(x, "gelu"),
        lambda: calls.activated(x.half(), "silu"),
        lambda: calls.activated(x, "silu", factor=torch.randn(6, 2).t()),
        lambda: calls.op(ssmkernels.rms_norm, torch.randn(6, 2).t(), torch.ones(6)),
        lambda: calls.op(ssmkernels.rms_norm, x, torch.ones(6), implementation="reference"),
    ):
        with torch.no_grad(), pytest.raises(NotPreparedError):
            refused()
    assert not calls.made
