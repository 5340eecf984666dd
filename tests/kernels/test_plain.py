"""Tensors without plain memory, and transforms that native code would hide from, take the reference."""

import subprocess
import sys

import pytest
import torch

from ssmkernels import rms_norm
from ssmkernels.dispatch import use

CALLS = {
    "fake": "with FakeTensorMode(): assert f(torch.randn(2, 8), torch.ones(8)).shape == (2, 8)",
    "zero": "assert f(torch._efficientzerotensor((2, 8)), w).eq(0).all()",
    "trace": "assert torch.allclose(torch.jit.trace(lambda x: f(x, w), x)(2 * x), r(2 * x, w), atol=1e-5)",
    "make_fx": "assert torch.allclose(make_fx(lambda x: f(x, w))(x)(2 * x), r(2 * x, w), atol=1e-5)",
    "vmap": "assert torch.allclose(torch.func.vmap(lambda x: f(x, w))(x), r(x, w), atol=1e-5)",
    "jvp": "a, b = [torch.func.jvp(lambda w: g(x, w), (w,), (w,))[1] for g in (f, r)]; "
    "assert b.abs().sum() > 1 and torch.allclose(a, b)",
    "dual": "import torch.autograd.forward_ad as ad\nwith ad.dual_level(): "
    "assert torch.allclose(ad.unpack_dual(f(x, ad.make_dual(w, w))).tangent, r(x, w))",
}
START = """
import torch
from functools import partial
with torch.inference_mode():
    from ssmkernels import rms_norm as f
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
r = partial(f, implementation="reference")
x, w = torch.randn(2, 8), torch.ones(8)
"""


def test_tensors_without_memory_and_transforms():
    code = START + "\n".join(CALLS.values())
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_forced_native_implementation_under_vmap_names_the_way_out():
    x, w = torch.randn(2, 8), torch.ones(8)
    with use("cpu"), pytest.raises(ValueError, match=r'vmap.*use\("reference"\)'):
        torch.func.vmap(lambda x: rms_norm(x, w))(x)


def test_disable_takes_an_implementation_from_one_op(monkeypatch):
    monkeypatch.setenv("SSMZOO_DISABLE", "cpu:rms_norm")
    with pytest.raises(ValueError, match="SSMZOO_DISABLE"):
        rms_norm(torch.ones(2, 8), torch.ones(8), implementation="cpu")
