"""What is said of a Triton that is broken, and of calls that its kernels refuse, in processes of their own."""

import os
import subprocess
import sys
import typing

import pytest
import torch

import ssmkernels
from ssmkernels.core.strided import strided, strided_token
from ssmkernels.ops.ssd.triton_arguments import Packing, Parts, Steps

PROGRAM = """
import torch, ssmkernels
x, weight = torch.randn(1, 4, 2), torch.randn(2, 3)
print(ssmkernels.explain("causal_conv1d", x, weight))
print(ssmkernels.causal_conv1d(x, weight).shape)
"""


def explained(tmp_path, package):
    """What ``explain`` prints where ``import triton`` finds this source, and kernels may run in the interpreter."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(package)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return run.stdout


def test_a_broken_triton_is_passed_over_with_its_reason(tmp_path):
    said = explained(tmp_path, "raise OSError('made for another machine')")
    assert "not triton: triton is installed but does not import (made for another machine): install it again" in said
    assert "torch.Size([1, 4, 2])" in said


STEPS = """
import torch, ssmkernels
r = torch.randn
scan = (torch.zeros(1, 2, 3), r(1, 2), r(1, 2), -torch.rand(2, 3).requires_grad_(), r(1, 3), r(1, 3))
convolution = (torch.zeros(1, 2, 2), r(1, 2), r(2, 3, requires_grad=True))
for op, arguments in (("selective_scan_step", scan), ("causal_conv1d_step", convolution)):
    print(ssmkernels.explain(op, *arguments))
    with torch.no_grad():
        print(ssmkernels.explain(op, *arguments).chosen)
"""


def test_steps_do_not_lose_a_gradient_in_silence(interpret):
    said = interpret(STEPS)
    assert said.count("not triton: a step has no gradient here; call it under torch.no_grad()") == 2
    assert said.count("\ntriton\n") == 2


def test_a_forced_step_says_why_it_has_no_gradient():
    weight = torch.randn(2, 3, requires_grad=True)
    if ssmkernels.OPS["causal_conv1d_step"].why_not("cpu"):
        pytest.skip("needs the native library")
    with pytest.raises(ValueError, match="'cpu' .* cannot run this call: a step has no gradient here"):
        ssmkernels.causal_conv1d_step(torch.zeros(1, 2, 2), torch.randn(1, 2), weight, implementation="cpu")


def test_a_tensor_and_its_strides_are_one_argument():
    x = torch.empty(2, 3, 5, 7)
    assert strided(x).at is x
    assert strided(x)[1:] == (105, 35, 7, 1)
    assert strided(x[..., 0])[1:] == (105, 35, 7, 0)
    assert strided_token(x[:, 0])[1:] == (105, 0, 7, 1)
    assert strided_token(x[:, 0, :, 0])[1:] == (105, 0, 7, 0)
    assert strided(None) is strided_token(None) is None


@pytest.mark.parametrize("argument", [Packing, Steps, Parts])
def test_no_length_is_in_a_tuple(argument):
    """For a number in a tuple that is 1 or a multiple of 16 Triton compiles again, do_not_specialize or not."""
    assert set(typing.get_type_hints(argument).values()) == {torch.Tensor}
