"""Triton kernels in Triton's interpreter, on the CPU: the whole check, on cases small enough for it.

In a process of its own: Triton reads ``TRITON_INTERPRET`` when it is imported. ``ssmzoo verify`` with that variable set
runs all cases; here each op has rows that between them reach every branch of its kernels.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

PROGRAM = """
import sys, warnings
import torch
from ssmkernels.testing import check

torch.set_num_threads(1)
warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # exp(-x) in a sigmoid: 1 / inf is 0
op, dtypes, rows = sys.argv[1], [getattr(torch, name) for name in sys.argv[2].split(",")], eval(sys.argv[3])
report = check(op, "triton", dtypes=dtypes, cases=rows)
print(report)
assert not report.skipped, report
"""

CONVOLUTION = [
    {"l": 17},
    {"l": 0},
    {"l": 2, "d": 3},
    {"w": 1, "l": 5},
    {"w": 7, "l": 9, "d": 2},
    {"bias": False, "activation": None, "state": False, "l": 5},
    {"b": 1, "packed": True, "l": 21},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "l": 7, "d": 2},
]
SCAN = [
    {"l": 5},
    {"l": 0},
    {"D": False, "z": False, "bias": False, "softplus": False, "state": False, "l": 3},
    {"l": 66, "d": 1, "n": 1, "b": 1},  # beyond a chunk
    {"n": 17, "l": 3, "d": 2},
    {"n": 256, "l": 2, "d": 2, "b": 1},
    {"d": 9, "g": 3, "l": 3, "n": 2},
    {"d": 33, "l": 2, "n": 16, "b": 1},  # several blocks of channels
    {"fixed": "BC", "l": 3, "d": 2},
    {"b": 1, "packed": True, "l": 7, "d": 2, "g": 2},
    {"layout": "strided", "l": 3},
    {"layout": "far", "b": 1, "l": 3, "d": 2},
]
DPLR = [
    {"length": 5},
    {"length": 0},
    {"n": 17, "d": 1, "length": 3},
    {"rank": 2, "d": 2, "length": 5},
    {"rank": 4, "d": 1, "n": 2, "length": 4},  # several groups of sums
    {"complex": False, "length": 4},
    {"length": 4200, "d": 1, "n": 1, "dt": 0.002},  # frequencies of several programs, backward too
    {"layout": "strided", "length": 3},
]
STEP = [{}, {"g": 3}, {"n": 17}, {"D": False, "z": False}, {"bias": False, "softplus": False}, {"layout": "strided"}]

CASES = [
    ("causal_conv1d", "float32", CONVOLUTION),
    ("causal_conv1d", "bfloat16,float16,float64", CONVOLUTION[:1] + CONVOLUTION[6:7]),
    ("causal_conv1d_step", "float32,bfloat16,float16,float64", [{}, {"w": 1}, {"layout": "far"}]),
    ("dplr_kernel", "float32", DPLR),
    ("dplr_kernel", "bfloat16,float16,float64", DPLR[3:4]),
    ("selective_scan", "float32", SCAN),
    ("selective_scan", "bfloat16,float16,float64", SCAN[:1] + SCAN[9:10]),
    ("selective_scan_step", "float32,bfloat16,float16,float64", STEP),
]


@pytest.mark.parametrize(("op", "dtypes", "rows"), CASES, ids=[f"{op}-{dtypes}" for op, dtypes, _ in CASES])
def test_check_in_the_interpreter(op, dtypes, rows):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SSMZOO_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, op, dtypes, repr(rows)],
        env={**environment, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_one_graph_and_opcheck():
    program = """
import torch
from ssmkernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step, use
from ssmkernels.dispatch import OPS

def both(x, weight, A, B, initial):
    x, last = causal_conv1d(x, weight, activation="silu", return_final_state=True)
    return (*selective_scan(x, x, A, B, B, delta_softplus=True, initial_state=initial, return_final_state=True), last)

def steps(window, state, x, weight, A, B):
    x = causal_conv1d_step(window, x, weight)
    return selective_scan_step(state, x, x, A, B, B, delta_softplus=True)

torch.manual_seed(0)
arguments = torch.randn(1, 3, 2), torch.randn(2, 2), -torch.rand(2, 2), torch.randn(1, 3, 2), torch.randn(1, 2, 2)
graph = torch.compile(both, fullgraph=True, backend="aot_eager")
with use("triton"):
    results = []
    for function in (both, graph):
        leaves = [a.clone().requires_grad_() for a in arguments]
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=0)
    x, weight, A, B, state = arguments
    states = [[torch.zeros(1, 1, 2), state.clone()] for _ in range(2)]
    eager = steps(*states[0], x[:, 0], weight, A, B[:, 0])
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")(*states[1], x[:, 0], weight, A, B[:, 0])
    for one, other in zip((eager, *states[0]), (compiled, *states[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

def opcheck(operator, *arguments):
    def leaf(a):
        return a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a

    torch.library.opcheck(operator.default, [leaf(a) for a in arguments])

ops = torch.ops.ssmkernels
borders = torch.tensor([0, 1, 3], dtype=torch.int32)
two = torch.randn(2, 2, 2)
opcheck(ops.causal_conv1d_triton, x, weight, A[:, 0], "silu", two[:, :1], borders)
opcheck(ops.selective_scan_triton, x, x * 2, A, B, B, A[:, 0], x * 3, A[:, 1], True, state, None, True)
opcheck(ops.selective_scan_triton, x, x * 2, A, A * 2, B, None, None, None, False, two, borders, True)
x0, x1, B0, B1 = x[:, 0].clone(), x[:, 1].clone(), B[:, 0].clone(), B[:, 1].clone()
torch.library.opcheck(ops.causal_conv1d_step_triton.default, (torch.zeros(1, 1, 2), x0, weight, None, None))
torch.library.opcheck(ops.selective_scan_step_triton.default, (state, x0, x1, A, B0, B1, None, None, None, True))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SSMZOO_")}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**environment, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
