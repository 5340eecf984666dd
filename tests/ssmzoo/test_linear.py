from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssmkernels import native
from ssmkernels.native import products
from ssmkernels.native.products import LARGE, linear
from ssmzoo.linear import Linear

OUT, IN = 1024, 640  # large enough
NATIVE = native.missing() is None


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


@pytest.fixture
def native_rows(monkeypatch):
    """Counts the products of the native library."""
    calls = []
    product = products._few_rows
    monkeypatch.setattr(products, "_few_rows", lambda x, *rest: calls.append(x.shape) or product(x, *rest))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (1, 1, IN), (3, 5, IN), (2, 0, IN), (2, 3, 4, IN)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs_product(shape, bias, onednn, native_rows):
    torch.manual_seed(0)
    module, x = Linear(IN, OUT, bias=bias), torch.randn(shape)
    found, expected = module(x), F.linear(x, module.weight, module.bias)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    of_one_row = torch.Size(shape).numel() == IN
    assert len(native_rows) == (of_one_row and NATIVE)
    assert len(onednn) == (0 not in shape and not (of_one_row and NATIVE))


@pytest.mark.skipif(not NATIVE, reason="needs the native library")
@torch.no_grad()
@pytest.mark.parametrize(("outputs", "size"), [(LARGE, 1), (1, LARGE), (1001, 525), (50280, 768)], ids=str)
def test_one_row_gives_the_same_bits_on_any_threads(outputs, size, native_rows):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 2 * size)[:, ::2], torch.randn(outputs, size), torch.randn(outputs)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(linear(x, weight, bias))
    torch.set_num_threads(threads)
    assert len(native_rows) == 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5 * size**0.5)


@pytest.mark.skipif(not NATIVE, reason="needs the native library")
def test_whoever_watches_operators_sees_one_row(native_rows):
    """Fake tensors, transforms, tangents and modes that count FLOPs need PyTorch's operator."""
    x, weight = torch.randn(1, IN), torch.randn(OUT, IN)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        linear(x, weight)
    assert flops.get_total_flops() == 2 * IN * OUT
    with torch.no_grad():
        assert torch.func.vmap(lambda row: linear(row, weight))(torch.randn(3, IN)).shape == (3, OUT)
        assert linear(x, torch.randn(IN, OUT).t()).shape == (1, OUT)
        assert linear(x, weight, torch.randn(OUT)).shape == (1, OUT)
        with pytest.raises(RuntimeError):
            linear(x, weight, torch.randn(OUT - 1))
    with FakeTensorMode() as mode, torch.no_grad():
        assert linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (1, OUT)
    assert len(native_rows) == 1


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
        large(torch.randn(2, IN))
    assert not onednn
    large(torch.randn(2, IN))
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
