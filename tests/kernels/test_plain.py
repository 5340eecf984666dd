"""Tensors without plain memory, and transforms that native code would hide from, take the reference."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ssmkernels import OPS, explain, rms_norm
from ssmkernels.check import matrix
from ssmkernels.check.spec import spec_of
from ssmkernels.check.ways import Calls, Refused
from ssmkernels.core import dispatch
from ssmkernels.core.dispatch import KERNELS
from ssmkernels.core.forcing import use

INFERENCE = """
import torch
with torch.inference_mode():
    import ssmkernels
x, w = torch.randn(2, 8, requires_grad=True), torch.ones(8)
f = lambda x: ssmkernels.rms_norm(x, w, implementation="reference").sin().sum()
g, = torch.autograd.grad(f(x), x)
c, = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
assert g.abs().sum() > 0 and torch.allclose(g, c), (g, c)
"""

WRONG = """
import dataclasses
from ssmkernels import OPS
from ssmkernels.check import matrix
from ssmkernels.check.spec import spec_of
from ssmkernels.check.ways import Calls

calls = Calls("fft_conv", spec_of("fft_conv"))
assert matrix.verdict(calls, "deepcopy") == matrix.RIGHT
made = OPS["fft_conv"].implementation("cpu")
wrong = dataclasses.replace(made, function=lambda a: 2 * made.function(a))
OPS["fft_conv"]._loaded["cpu"] = wrong
for way in ("deepcopy", "pickle", "inference_mode", "threads", "fork", "compile"):
    verdict = matrix.verdict(calls, way)
    assert verdict == matrix.FAULT + "another result", (way, verdict)
"""

FIRST_USE = """
import sys, threading
import ssmkernels
from ssmkernels import OPS

sys.setswitchinterval(1e-6)
together, faults = threading.Barrier(4), []

def use_all():
    for op in OPS.values():
        for name in op.names:
            together.wait()
            try:
                op.implementation(name)
            except Exception as error:
                faults.append(f"{op.name} {name}: {error}")

threads = [threading.Thread(target=use_all) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not faults, faults
"""


@pytest.mark.op
def test_every_op_with_tensors_that_are_not_plain_and_under_transforms():
    """In the ways that the table in docs/calls.md has not; that table's are tried where it is compared."""
    faults = [cell for cell in matrix.cells(ways=matrix.OTHERS) if cell.verdict.startswith(matrix.FAULT)]
    assert faults == []


PLAIN = [(op, name) for op in OPS for name in OPS[op].names if name not in {*KERNELS, "reference"}]


@pytest.mark.parametrize(("op", "implementation"), PLAIN)
def test_what_is_forced_under_transforms_is_right_or_names_the_way_out(op, implementation):
    """Of those made of PyTorch's operators: PyTorch's own errors for a missing rule do not."""
    if why_not := OPS[op].why_not(implementation):
        pytest.skip(why_not)
    with use(**{op: implementation}):
        calls = Calls(op, spec_of(op))
        for way in ("vmap", "jvp", "grad", "double_backward"):
            assert not matrix.verdict(calls, way).startswith(matrix.FAULT), way


def test_threads_that_use_an_implementation_first_at_the_same_time(apart):
    apart(FIRST_USE)


class Stub:
    """Ways that end in all possible manners."""

    def right(self):
        return True

    def wrong(self):
        return False

    def refused(self):
        raise Refused("for a reason")

    def broken(self):
        raise KeyError("broken")

    def by_reference(self):
        if dispatch._forced.get("*") == "reference":
            return True
        raise RuntimeError('use("reference") can')

    def by_nothing(self):
        raise RuntimeError('use("reference") can')


def test_a_cell_is_right_or_says_why_not():
    verdicts = {way: matrix.verdict(Stub(), way) for way in vars(Stub) if not way.startswith("_")}
    assert verdicts == {
        "right": matrix.RIGHT,
        "wrong": matrix.FAULT + "another result",
        "refused": "for a reason",
        "broken": matrix.FAULT + "KeyError: 'broken'",
        "by_reference": matrix.REFERENCE,
        "by_nothing": matrix.FAULT + 'RuntimeError: use("reference") can',
    }


def test_a_process_that_ends_loses_one_cell_alone():
    lost, kept = matrix.cells(["no such op", "rms_norm"], ["fake"])
    assert lost.verdict.startswith(matrix.FAULT + "ends its process")
    assert kept == ("rms_norm", "fake", matrix.RIGHT)


def test_the_matrix_sees_a_wrong_kernel(apart):
    """In a process of its own, which is small enough to fork whatever tests have run before."""
    apart(WRONG)


@pytest.mark.op
@pytest.mark.slow
def test_random_calls_in_processes_of_their_own():
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("fuzz.py")),
        "--calls",
        "400",
        "--seed",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_gradients_survive_an_import_under_inference_mode(apart):
    apart(INFERENCE)


def test_uses_that_threads_leave_in_another_order_than_they_entered_are_all_undone():
    entered, left = threading.Event(), threading.Event()

    def other():
        with use(rms_norm="reference"):
            entered.set()
            left.wait(300)

    x, w = torch.ones(2, 8), torch.ones(8)
    before = explain(rms_norm, x, w).chosen
    thread = threading.Thread(target=other)
    outer = use(rms_norm=before)
    with outer:
        thread.start()
        assert entered.wait(300)
        assert explain(rms_norm, x, w).chosen == "reference"  # the latest counts
    assert explain(rms_norm, x, w).chosen == "reference"  # as the other thread is still inside
    left.set()
    thread.join()
    assert "fastest" in explain(rms_norm, x, w).origin


def test_forced_native_implementation_under_vmap_names_the_way_out():
    x, w = torch.randn(2, 8), torch.ones(8)
    with use("cpu"), pytest.raises(ValueError, match=r'vmap.*use\("reference"\)'):
        torch.func.vmap(lambda x: rms_norm(x, w))(x)


def test_disable_takes_an_implementation_from_one_op(monkeypatch):
    monkeypatch.setenv("SSMZOO_DISABLE", "cpu:rms_norm")
    with pytest.raises(ValueError, match="SSMZOO_DISABLE"):
        rms_norm(torch.ones(2, 8), torch.ones(8), implementation="cpu")
