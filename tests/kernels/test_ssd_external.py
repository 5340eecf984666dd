"""mamba_ssm as an implementation of `ssd`, with a stand-in that has its signature and its demands.

The package itself needs a GPU. What is tested is all around it: dtypes, gradients, refusals, dispatch.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch

import ssmkernels
from ssmkernels import explain, ssd
from ssmkernels.bench.peers import peers_of
from ssmkernels.check.running import is_real_or_complex, with_gradients
from ssmkernels.check.spec import spec_of
from ssmkernels.ops.ssd import external_mamba_ssm
from ssmkernels.testing import check

pytestmark = pytest.mark.op("ssd")


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
    return_varlen_states=False,
):
    """mamba_ssm's, with what its code demands; what it computes is our recurrence."""
    batch, length, heads, p = x.shape
    groups, n = B.shape[2:]
    assert x.dtype in (torch.float16, torch.bfloat16)
    assert chunk_size in (16, 32, 64, 128, 256)
    assert heads % groups == 0
    assert B.shape == C.shape == (batch, length, groups, n)
    assert dt.shape == (batch, length, heads)
    assert A.shape == (heads,)
    assert z is None or z.shape == x.shape
    assert D is None or D.shape in ((heads, p), (heads,))
    assert initial_states is None or initial_states.shape == (batch, heads, p, n)
    assert seq_idx is None
    assert cu_seqlens is None
    assert not return_varlen_states
    return ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_states,
        return_final_state=return_final_states,
        implementation="reference",
    )


@pytest.fixture
def package(gpu, stand_in, monkeypatch):
    for module in (
        stand_in("mamba_ssm"),
        stand_in("mamba_ssm.ops"),
        stand_in("mamba_ssm.ops.triton"),
        stand_in("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined),
    ):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert ssmkernels.OPS["ssd"].why_not("mamba_ssm") == ""  # and remembered
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what else asks for a GPU shall not find one
    monkeypatch.setattr(external_mamba_ssm.external, "wrong_device", lambda a: None)


CASES = (
    {"l": 5},
    {"l": 5, "D": "", "z": False, "bias": False, "softplus": False, "state": False},
    {"l": 5, "D": "hp", "limit": (0.3, 0.9), "chunk": 4},
    {"l": 5, "weights": "same", "g": 4},
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_called_with_what_it_takes(case, package):
    report = check("ssd", "mamba_ssm", cases=[case], dtypes=[torch.bfloat16], quick=True)
    assert report.checks
    assert not report.skipped


@pytest.mark.parametrize(
    ("case", "dtype", "why"),
    [
        ({"b": 1, "packed": True}, torch.bfloat16, "states of packed sequences"),
        ({}, torch.float64, "float64"),
        ({}, torch.float32, "products in float32, which it rounds to TF32"),
        ({"l": 0}, torch.bfloat16, "empty inputs"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_told_and_goes_elsewhere(case, dtype, why, package):
    spec = spec_of("ssd")
    explanation = explain(ssd, **spec.inputs(spec.case(case), dtype, "cpu", 0))
    assert explanation.reasons["mamba_ssm"] == why
    assert explanation.chosen != "mamba_ssm"


def test_a_second_derivative_is_refused(package):
    spec = spec_of("ssd")
    arguments = with_gradients(spec.inputs(spec.case({"b": 1, "l": 5}), torch.bfloat16, "cpu", 0))
    y, _ = ssd(**arguments, implementation="mamba_ssm")
    leaves = [value for value in arguments.values() if is_real_or_complex(value)]
    torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="mamba_ssm's kernels have no second derivative"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


def test_the_peer_is_the_same_call(package):
    (peer,) = (p for p in peers_of("ssd", "cuda") if p.name == "mamba_ssm")
    assert check("ssd", peer.function, cases=[{}], dtypes=[torch.bfloat16], gradients=False).checks


@pytest.mark.parametrize(("hint", "length"), [(None, 256), (1, 16), (16, 16), (17, 32), (100, 128), (1000, 256)])
def test_chunks_are_powers_of_two(hint, length):
    assert external_mamba_ssm.chunk_length(hint) == length
