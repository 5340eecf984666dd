"""The long convolution's Triton kernels, in the interpreter: beyond what every kernel's check covers."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import OPS

CUTS_OFF = """
import numpy, torch
import triton.runtime.interpreter as interpreter
from ssmkernels.testing import check

def cut(x):
    near = x.astype(numpy.float32)
    return numpy.where(abs(near) > abs(x), numpy.nextafter(near, numpy.float32(0)), near)

def dot(self, a, b, sums, *how):
    assert a.data.dtype == b.data.dtype == numpy.float16
    total, products = sums.data, a.data.astype(float)[:, :, None] * b.data.astype(float)
    for first in range(0, products.shape[1], 8):
        total = cut(total + products[:, first : first + 8].sum(1))
    dots.append(1)
    return interpreter.TensorHandle(total, sums.dtype.scalar)

dots = []
interpreter.InterpreterBuilder.create_dot = dot
rows = [dict(b=1, d=1, l_r=12), dict(b=1, d=1, l=300, l_k=300), dict(b=1, d=1, l=2050, l_k=2050)]
check("fft_conv", "triton", cases=rows, dtypes=[torch.float32], quick=True)
assert dots
"""
PARTS = """
import torch
from ssmkernels.ops.fft_conv import triton_launch
from ssmkernels.testing import check

triton_launch.PROGRAMS = 2
rows = [dict(b=5, d=1, l=9, gate=True), dict(b=2, d=3, l=5)]
check("fft_conv", "triton", cases=rows, dtypes=[torch.float32], quick=True)
"""
LONG = """
import torch
from ssmkernels.ops.fft_conv import triton_launch
from ssmkernels.testing import check

triton_launch.LARGEST = 256
rows = [
    dict(b=2, d=1, l=600, l_k=700, l_r=300, gate=True),
    dict(b=1, d=2, l=513, l_k=20, D=False),
    dict(b=1, d=1, l=520, l_k=0, l_r=600),
    dict(b=1, d=1, l=1400, l_k=1400, l_r=9, packed=True, gate=True),
]
check("fft_conv", "triton", cases=rows, dtypes=[torch.float32, torch.bfloat16], quick=True)
"""
OPERATOR = """
import torch
from ssmkernels import fft_conv

def convolve(u, kernel, D, reverse, gate, borders):
    return fft_conv(u, kernel, D, kernel_reverse=reverse, gate=gate, cu_seqlens=borders, implementation="triton")

torch.manual_seed(0)
wanted = [torch.randn(shape, requires_grad=True) for shape in ((1, 7, 2), (2, 9), (2,), (2, 3), (1, 7, 2))]
u, kernel, D, reverse, gate = wanted
borders = torch.tensor([0, 3, 7], dtype=torch.int32)
for arguments in ((u, kernel, D, reverse, gate, borders), (u, kernel, None, None, None, None)):
    results = []
    for function in (convolve, torch.compile(convolve, fullgraph=True, backend="aot_eager")):
        y = function(*arguments)
        used = [a for a in arguments if a is not None and a.requires_grad]
        results.append([y, *torch.autograd.grad(y.sin().sum(), used)])
    torch.library.opcheck(torch.ops.ssmkernels.fft_conv_triton, (*arguments, True))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=0)
every = torch.autograd.grad(convolve(*wanted, borders).sum(), wanted)
for some in ([0], [1, 2, 3], [4]):  # no gradient is wanted of the others
    given = [x if i in some else x.detach() for i, x in enumerate(wanted)]
    found = torch.autograd.grad(convolve(*given, borders).sum(), [wanted[i] for i in some])
    assert all(torch.equal(one, every[i]) for one, i in zip(found, some, strict=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [CUTS_OFF, PARTS, LONG, OPERATOR], ids=["cuts off", "parts", "long", "operator"])
def test_triton(program, interpret):
    """Matrix units that cut off what sums of 8 products lose; sums in parts; no circle that fits; an operator."""
    interpret(program)


def test_what_triton_cannot_do(randn, monkeypatch):
    from ssmkernels.ops.fft_conv import triton

    def why(length, taps, reverse=None, dtype=torch.float32, **given):
        kernels = {"kernel": randn(1, taps), "kernel_reverse": None if reverse is None else randn(1, reverse)}
        nothing = {"D": None, "gate": None, "cu_seqlens": None}
        a = {"u": torch.empty(1, length, 1, dtype=dtype), **nothing, **kernels, **given}
        return triton.unsupported(OPS["fft_conv"].declared.Arguments(**a))

    monkeypatch.setattr(triton, "wrong_device", lambda a: None)
    assert why(4096, 4097) is why(16384, 16384) is None
    assert why(5, 5, dtype=torch.float64) == "float64"
    call = OPS["fft_conv"].declared.Arguments(torch.empty(1, 20000, 1), randn(1, 16385), None, None, None, None)
    assert "more than 16384 taps" in triton.slow(call)
    assert "more than 16384 taps" in triton.slow(call._replace(kernel=call.kernel[:, 1:], kernel_reverse=randn(1, 1)))
    assert triton.slow(call._replace(kernel=call.kernel[:, 1:])) is None
    assert triton.slow(call._replace(u=call.u[:, :16384])) is None
