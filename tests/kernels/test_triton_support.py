"""What is said of a Triton that is broken or missing, each in a process where it is so."""

import os
import subprocess
import sys

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
