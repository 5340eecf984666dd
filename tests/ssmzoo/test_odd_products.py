"""Large products stay PyTorch's where its own operator knows more: odd biases, signs put off, transforms, traces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ssmkernels import native
from ssmkernels.native import products
from ssmkernels.native.eager import finite_exp
from ssmkernels.native.products import linear

OUT, IN = 1024, 640  # large enough
ROWS = [(IN,), (2, 1, IN), (9, IN), (3, 5, IN)]  # one, a token of each sequence, several
EVERY_SET = frozenset(isa for known in native.sources.ISAS.values() for isa in known)
WAYS = {"the native product": EVERY_SET, "oneDNN": frozenset()}


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    """Whichever takes several rows on some machine."""
    monkeypatch.setattr(products, "MATMUL", WAYS[request.param])


def given(shape=(9, IN)):
    torch.manual_seed(0)
    return torch.randn(shape), torch.randn(OUT, IN) / IN**0.5


BIASES = {
    "of one number": lambda: torch.randn(1),
    "a scalar": lambda: torch.tensor(2.0),
    "with an axis of rows": lambda: torch.randn(1, OUT),
    "with gaps": lambda: torch.randn(OUT, 2)[:, 0],
    "expanded": lambda: torch.randn(1).expand(OUT),
    "with its sign put off": lambda: torch._neg_view(torch.randn(OUT)),
}


@torch.no_grad()
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("bias", BIASES)
def test_biases(bias, shape):
    x, weight = given(shape)
    b = BIASES[bias]()
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [torch.zeros(OUT + 1), torch.zeros(OUT - 1), torch.zeros(OUT).double()], ids=str)
def test_biases_that_pytorch_refuses(bias):
    x, weight = given()
    with pytest.raises(RuntimeError) as expected:
        F.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as found:
        linear(x, weight, bias)
    assert str(found.value) == str(expected.value)


@torch.no_grad()
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_signs_that_are_put_off(shape):
    x, weight = given(shape)
    y = F.linear(x, weight)
    torch.testing.assert_close(linear(torch._neg_view(x), weight), -y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, torch._neg_view(weight)), -y, rtol=1e-5, atol=1e-5)


def test_an_exponential_of_a_sign_that_is_put_off():
    x = torch.randn(4, 70)
    torch.testing.assert_close(finite_exp(torch._neg_view(x)), torch.exp(-x))


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_derivatives_that_are_carried_forward(shape):
    x, weight = given(shape)
    dx = torch.randn(shape)
    expected = F.linear(dx, weight)
    found = [torch.func.jvp(lambda x: linear(x, weight), (x,), (dx,))[1]]
    with forward_ad.dual_level():
        found.append(forward_ad.unpack_dual(linear(forward_ad.make_dual(x, dx), weight)).tangent)
    for tangent in found:
        assert tangent is not None
        torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_many_calls_at_once_and_traces(shape):
    x, weight = given((2, *shape))
    y = F.linear(x, weight)
    torch.testing.assert_close(torch.vmap(lambda x: linear(x, weight))(x), y, rtol=1e-5, atol=1e-5)
    traced = torch.jit.trace(lambda x: linear(x, weight), (x[0],))
    torch.testing.assert_close(traced(x[1]), y[1], rtol=1e-5, atol=1e-5)
    assert "aten::linear" in str(traced.graph)
