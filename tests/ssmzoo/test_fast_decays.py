"""Rates of decay beyond what float32 holds: the outputs and gradients that float64 gives."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch

import ssmzoo
from ssmkernels.core.finite import finite_exp

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]
D_MODEL = 16
LOGARITHMS = re.compile(r"A(_b)?_log|inv_A_real|nu_log")  # of rates
MIXERS = (
    "mamba",
    "mamba2",
    "log_linear_mamba2",
    "gated_deltanet",
    "gated_deltaproduct",
    "kda",
    "h3",
    "lru",
    "s4",
    "s4d",
)
CASES = [
    *((name, SMALL[name]) for name in MIXERS),
    *((name, SMALL[name] | {"bidirectional": True}) for name in ("mamba", "mamba2", "lru", "s4d")),
    ("kda", SMALL["kda"] | {"gate_lower_bound": -5.0}),
]


def rates(mixer):
    return {name: p for name, p in mixer.named_parameters() if LOGARITHMS.fullmatch(name.rpartition(".")[2])}


def results(mixer, x):
    """The outputs, and the gradients of the input and of all weights."""
    x = x.clone().requires_grad_()
    y = mixer(x)
    names, weights = zip(*mixer.named_parameters(), strict=True)
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad(y, [x, *weights], given, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(("x", *names), gradients, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_exponential_is_finite(dtype):
    x = torch.tensor([-torch.inf, -1.0, 11.0, 1000.0, torch.inf, torch.nan], dtype=dtype, requires_grad=True)
    y = finite_exp(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y[:3], torch.exp(x[:3]))
    assert y[3:5].isfinite().all()
    assert y[5].isnan()
    assert torch.equal(gradient[:3], y[:3])
    assert (gradient[3:5] == 0).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_rates_beyond_float32(name, options):
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, D_MODEL, **options)
    with torch.no_grad():
        for logarithm in rates(mixer).values():
            logarithm.view(-1)[::2] = 90.0
    x = torch.randn(2, 9, D_MODEL)
    exact, found = results(copy.deepcopy(mixer).double(), x.double()), results(mixer, x)
    for what, truth in exact.items():
        torch.testing.assert_close(
            found[what].double(), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()), msg=what
        )


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("log_linear_mamba2",)])
def test_tokens_one_by_one_with_rates_beyond_float32(name):
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, D_MODEL, **SMALL[name]).eval()
    with torch.no_grad():
        for logarithm in rates(mixer).values():
            logarithm.view(-1)[::2] = 90.0
        x = torch.randn(2, 5, D_MODEL)
        whole, state, steps = mixer(x), mixer.initial_state(2), []
        for i in range(5):
            y, state = mixer(x[:, i : i + 1], state)
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_every_mixer_with_a_logarithm_of_a_rate_is_here():
    having = {name for name, options in SMALL.items() if rates(ssmzoo.build_mixer(name, D_MODEL, **options))}
    assert having == set(MIXERS)
