"""The residual stream: what layers add to it, and its norm for layers in half precision, by the native library."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import native, rms_norm, use
from ssmkernels.native import eager
from ssmzoo.norm import CentredRMSNorm, RMSNorm

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")

PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
SHAPE = (2, 700, 97)  # more than one task, and no whole vectors at the end


@pytest.fixture
def calls(monkeypatch):
    """The native calls that are made."""
    made, run = [], native.run

    def noted(name, values):
        made.append(name)
        run(name, values)

    monkeypatch.setattr(native, "run", noted)
    return made


def given(x=torch.float32, y=torch.float32, shape=SHAPE):
    torch.manual_seed(0)
    stream, part = torch.randn(shape).to(x), torch.randn(shape).to(y)
    stream[0, :5, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(x).max, -0.0]).to(x)
    part[0, :5, 0] = torch.tensor([1.0, -torch.inf, -torch.inf, torch.finfo(y).max, -0.0]).to(y)
    return stream, part


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_sums_have_the_bits_of_pytorch(pair, calls):
    x, y = given(*pair)
    found, expected = eager.add(x, y), x + y
    assert calls == ["add"]
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(found[0, 4].signbit(), expected[0, 4].signbit())


def test_a_sum_larger_than_caches(calls):
    x, y = given(shape=(1, 1100, 4099))
    assert torch.equal(eager.add(x, y)[0, 5:], (x + y)[0, 5:])
    assert calls == ["add"]


OTHERS = {
    "few numbers": lambda x, y: (x[:1, :9], y[:1, :9]),
    "another shape": lambda x, y: (x, y[:, :1]),
    "gaps": lambda x, y: (x[..., ::2], y[..., ::2]),
    "a stream in half precision beside float32": lambda x, y: (x.bfloat16(), y),
    "float64": lambda x, y: (x.double(), y.double()),
    "whole numbers": lambda x, y: (x.nan_to_num(0, 0, 0).int(), y.nan_to_num(0, 0, 0).int()),
    "a sign that is put off": lambda x, y: (torch._neg_view(x), y),
    "gradients": lambda x, y: (x, y.requires_grad_()),
}


@pytest.mark.parametrize("other", OTHERS)
def test_sums_that_stay_pytorchs(other, calls):
    x, y = OTHERS[other](*given())
    found, expected = eager.add(x, y), x + y
    assert not calls
    assert found.dtype == expected.dtype
    assert found.requires_grad == expected.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", [RMSNorm, CentredRMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_for_half_precision_have_the_bits_of_two_steps(dtype, kind, calls):
    x = given()[0]
    norm = kind(SHAPE[-1], eps=1e-3).to(dtype)
    norm.weight.normal_()
    weight = norm.weight if kind is RMSNorm else 1 + norm.weight
    found, shorter = norm(x), norm(x[0, :1])
    assert calls == ["rms_norm", "rms_norm"]
    expected = rms_norm(x, weight.float(), eps=1e-3).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(shorter.nan_to_num(7.0), expected[0, :1].nan_to_num(7.0))


@pytest.mark.parametrize("why", ["gradients", "forced", "gaps", "empty", "another width"])
def test_norms_that_take_two_steps(why):
    x, norm = torch.randn(3, 8, 16), RMSNorm(16).bfloat16()
    if why == "gradients":
        norm(x).sum().backward()
        assert norm.weight.grad is not None
    with torch.no_grad():
        expected = norm(x)
        if why == "forced":
            with use("reference"):
                assert eager.rms_norm_in_half(x, norm.weight, norm.eps) is None
                torch.testing.assert_close(norm(x), expected)
        if why == "gaps":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
            assert eager.rms_norm_in_half(x, norm.weight, norm.eps) is None
            assert torch.equal(norm(x), expected)
        if why == "empty":
            assert norm(x[:0]).shape == (0, 8, 16)
        if why == "another width":
            with pytest.raises(ValueError, match="weight"):
                norm(x[..., :15].contiguous())
