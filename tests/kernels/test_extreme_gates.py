"""Matrix states whose gates are at their ends: decays of 1 beside 0, nothing written, reflections, long keys."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ssmkernels
from ssmkernels import native

LENGTHS = {0.0: 70, 1.0: 70, 30.0: 5}  # by the norm of keys: longer ones make a state grow by |1 - β norm²| a token
WALLS = (0.0, -1e-4, -30.0, -100.0, -1e4, -math.inf)
EPS = torch.finfo(torch.float32).eps
STATES = ("linear_attention", "delta_rule", "generalized_delta_rule")
NEEDS = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
IMPLEMENTATIONS = ("tiled", pytest.param("cpu", marks=NEEDS))


@pytest.fixture
def arguments(randn):
    """By op, log decay (one for all tokens, or None for all of ``WALLS`` and others in turn), β and norm of keys."""

    def make(op: str, decay: float | None, beta: float, norm: float, per_key: bool) -> dict[str, Tensor]:
        b, l, h, k, v = 1, LENGTHS[norm], 2, 8, 6
        log_decay = -randn(b, l, h, *([k] if per_key else [])).abs()
        if decay is not None:
            log_decay = torch.full_like(log_decay, decay)
        else:
            flat = log_decay.view(-1)
            for i, wall in enumerate(WALLS):
                flat[i :: 2 * len(WALLS) + 1] = wall
        made = {"q": randn(b, l, h, k), "k": norm * F.normalize(randn(b, l, h, k), dim=-1), "v": randn(b, l, h, v)}
        if op == "delta_rule":
            made["beta"] = torch.full((b, l, h), beta, dtype=torch.float64)
        if op == "generalized_delta_rule":
            along = F.normalize(randn(b, l, h, k), dim=-1)
            made |= {"a": -beta * along, "b": along}
        return made | {"log_decay": log_decay, "initial_state": randn(b, h, k, v)}

    return make


def results(op: str, implementation: str, arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {name: a.to(dtype, copy=True).requires_grad_() for name, a in arguments.items()}
    call: Any = getattr(ssmkernels, op)
    outputs = call(**leaves, return_final_state=True, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
    found = dict(zip(("o", "final_state", *leaves), (*outputs, *gradients), strict=True))
    return {name: t.detach().double() for name, t in found.items()}


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("norm", LENGTHS)
@pytest.mark.parametrize("decay", [None, 0.0, -100.0, -1e4, -math.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", STATES)
def test_gates_at_their_ends(op, implementation, decay, norm, arguments):
    betas = (1.0,) if op == "linear_attention" else (0.0, 1.0, 2.0)
    for beta, per_key in itertools.product(betas, (True,) if op == "generalized_delta_rule" else (False, True)):
        made = {name: a.float() for name, a in arguments(op, decay, beta, norm, per_key).items()}
        exact, peer = (results(op, "reference", made, dtype) for dtype in (torch.float64, torch.float32))
        double, single = (results(op, implementation, made, dtype) for dtype in (torch.float64, torch.float32))
        for name, truth in exact.items():
            assert single[name].isfinite().all(), name
            assert error(double[name], truth) < 1e-10, name
            assert error(single[name], truth) <= 4 * error(peer[name], truth) + 16 * EPS, name


@pytest.mark.parametrize("decay", [-1.0, -20.0, 0.25])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", STATES)
def test_values_near_the_largest_number(op, implementation, decay, arguments):
    """What keeps a decay apart from a state may not divide what is written by it."""
    for per_key in (True,) if op == "generalized_delta_rule" else (False, True):
        made = {name: a.float() for name, a in arguments(op, decay, 1.0, 1.0, per_key).items()}
        made = {name: a[:, :12] if name != "initial_state" else a for name, a in made.items()}
        made |= {name: 1e34 * made[name] for name in ("v", "initial_state")}
        exact, peer = (results(op, "reference", made, dtype) for dtype in (torch.float64, torch.float32))
        found = results(op, implementation, made, torch.float32)
        for name, truth in exact.items():
            assert found[name].isfinite().all(), name
            assert error(found[name], truth) <= 4 * error(peer[name], truth) + 16 * EPS, name
