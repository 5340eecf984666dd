from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmkernels.core import products
from ssmkernels.core.products import LARGE, linear
from ssmzoo.linear import Linear

OUT, IN = 1024, 640  # large enough


@pytest.fixture
def onednn(monkeypatch):
    """Counts the products that go through oneDNN."""
    if not products._available():
        pytest.skip("needs a PyTorch with oneDNN")
    calls = []
    product = torch.ops.mkldnn._linear_pointwise

    class Counting:
        @staticmethod
        def _linear_pointwise(*args):
            calls.append(args[1].shape)
            return product(*args)

    monkeypatch.setattr(torch.ops, "mkldnn", Counting)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (1, 1, IN), (3, 5, IN), (2, 0, IN), (2, 3, 4, IN)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs_product(shape, bias, onednn):
    torch.manual_seed(0)
    module, x = Linear(IN, OUT, bias=bias), torch.randn(shape)
    found, expected = module(x), F.linear(x, module.weight, module.bias)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(onednn) == (0 if 0 in shape else 1)


@torch.no_grad()
def test_any_strides(onednn):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 2 * IN)[..., ::2], torch.randn(IN, OUT).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    expanded = torch.randn(1, 1, IN).expand(4, 3, IN)
    torch.testing.assert_close(linear(expanded, weight), F.linear(expanded, weight), rtol=1e-4, atol=1e-4)


def test_gradients_go_torchs_own_way(onednn):
    module, x = Linear(IN, OUT), torch.randn(2, IN, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is not None
    assert not onednn


@torch.no_grad()
def test_what_stays_with_torch(onednn):
    large = Linear(IN, OUT)
    small = Linear(8, LARGE // 8 - 1)
    small(torch.randn(1, 8))
    large.double()(torch.randn(1, IN).double())
    large.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert large(torch.randn(1, IN)).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        large(torch.randn(1, IN))
    assert not onednn
    large(torch.randn(1, IN))
    assert len(onednn) == 1


def test_it_is_a_linear_map_to_everyone():
    module = Linear(4, 3)
    assert isinstance(module, nn.Linear)
    assert list(module.state_dict()) == ["weight", "bias"]
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 5))


@torch.no_grad()
def test_compiles():
    module, x = Linear(IN, OUT), torch.randn(2, IN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
