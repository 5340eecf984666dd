"""Recurrences whose gates are at their ends: decays of 1 beside 0, nothing written, reflections, long keys."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import extreme_gates
import pytest
from extreme_gates import assert_as_exact, matrix_memory, matrix_state, scan

from ssmkernels import native

LENGTHS = {0.0: 70, 1.0: 70, 30.0: 5}  # by the norm of keys: longer ones make a state grow by |1 - β norm²| a token
STATES = ("linear_attention", "delta_rule", "generalized_delta_rule")
NEEDS = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
IMPLEMENTATIONS = ("tiled", pytest.param("cpu", marks=NEEDS))


def decays_of(op):
    return (True,) if op == "generalized_delta_rule" else (False, True)


@pytest.mark.parametrize("norm", LENGTHS)
@pytest.mark.parametrize("decay", [None, 0.0, -100.0, -1e4, -math.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", STATES)
def test_gates_at_their_ends(op, implementation, decay, norm, randn):
    betas = (1.0,) if op == "linear_attention" else (0.0, 1.0, 2.0)
    for beta, per_key in itertools.product(betas, decays_of(op)):
        made = matrix_state(randn, op, decay, beta, norm, shape=(1, LENGTHS[norm], 2, 8, 6), per_key=per_key)
        assert_as_exact(op, implementation, made, double=True)


@pytest.mark.parametrize("decay", [-1.0, -20.0, 0.25])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", STATES)
def test_values_near_the_largest_number(op, implementation, decay, randn):
    """What keeps a decay apart from a state may not divide what is written by it."""
    for per_key in decays_of(op):
        made = matrix_state(randn, op, decay, 1.0, 1.0, shape=(1, 12, 2, 8, 6), per_key=per_key)
        made |= {name: 1e34 * made[name] for name in ("v", "initial_state")}
        assert_as_exact(op, implementation, made)


@pytest.mark.parametrize("f", [None, 0.0, -100.0, -1e30, -math.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gates_of_the_matrix_memory(implementation, f, randn):
    for i in (1.0, 30.0, 100.0):
        assert_as_exact("mlstm", implementation, matrix_memory(randn, f, i, length=50))


@pytest.mark.parametrize("rate", [-1.0, -1e4, -3e38])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", ["ssd", "selective_scan"])
def test_steps_at_their_ends(op, implementation, rate, randn):
    assert_as_exact(op, implementation, scan(randn, op, rate, length=50))


INTERPRETED = """
import math
import sys

import torch

sys.path.append(sys.argv[2])
from extreme_gates import assert_as_exact, matrix_memory, matrix_state, scan

op, generator = sys.argv[1], torch.Generator().manual_seed(0)

def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

def check(made):
    assert_as_exact(op, "triton", made)

if op == "mlstm":
    for f in (None, -1e30, -math.inf):
        for i in (1.0, 100.0):
            check(matrix_memory(randn, f, i, length=19))
elif op in ("ssd", "selective_scan"):
    for rate in (-1.0, -1e4, -3e38):
        check(scan(randn, op, rate, length=19))
else:
    alone = op == "generalized_delta_rule"  # whose kernels take the longest here
    for decay in (None,) if alone else (None, -math.inf):
        for beta in (2.0,) if alone else (0.0, 2.0) if op == "delta_rule" else (1.0,):
            for norm, length in ((1.0, 19), (30.0, 5)):
                for per_key in (True,) if alone else (False, True):
                    shape = (1, length, 1, 3, 2)
                    check(matrix_state(randn, op, decay, beta, norm, shape=shape, per_key=per_key))
"""


@pytest.mark.slow
@pytest.mark.parametrize("op", [*STATES, "mlstm", "ssd", "selective_scan"])
def test_gates_at_their_ends_in_the_interpreter(op, interpret):
    interpret(INTERPRETED, op, str(Path(extreme_gates.__file__).parent))
