"""Mamba-3's recurrence against masked attention, against ssd, cut into pieces, and what it refuses."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from implementations import every_implementation, with_final_state
from mamba3_parallel import mamba3_parallel

from ssmkernels import mamba3_scan, mamba3_scan_step, ssd

TIMED = ("x", "dt", "A", "B", "C", "trap", "angles", "z")
STATES = ("state", "angle", "key", "value")
EVERY = every_implementation("mamba3_scan")
scan = with_final_state(mamba3_scan)


@pytest.fixture
def arguments(randn):
    def make(*, b=2, l=9, r=1, h=4, p=3, n=7, g=2, a=2, state=True, **given):
        made = {
            "x": randn(b, l, r, h, p),
            "dt": randn(b, l, h).abs(),
            "A": -randn(b, l, h).abs(),
            "B": randn(b, l, r, g, n),
            "C": randn(b, l, r, g, n),
            "trap": torch.sigmoid(randn(b, l, h)),
            "angles": 3 * randn(b, l, a),
            "B_bias": randn(h, r, n),
            "C_bias": randn(h, r, n),
            "D": randn(h),
            "z": randn(b, l, r, h, p),
        }
        if state:
            shapes = ((b, h, p, n), (b, h, a), (b, r, h, n), (b, r, h, p))
            made |= {f"initial_{name}": randn(*shape) for name, shape in zip(STATES, shapes, strict=True)}
        return {name: t for name, t in (made | given).items() if t is not None}

    return make


def reduced(function):
    """The angle that a function returns as a point of the circle, which knows no whole turns."""

    def call(**arguments):
        y, h, theta, k, v = function(**arguments)
        return y, h, torch.cos(theta), torch.sin(theta), k, v

    return call


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"state": False, "z": None, "B_bias": None, "g": 1},
        {"r": 3, "interleaved": False},
        {"r": 2, "n": 4, "l": 70, "b": 1, "h": 1, "g": 1},
        {"a": 3, "interleaved": False, "g": 4, "D": None},
    ],
    ids=str,
)
@EVERY
def test_masked_attention(changes, scan, arguments, run, assert_same):
    made = arguments(**changes)
    assert_same(run(reduced(scan), **made), run(reduced(mamba3_parallel), **made), roundings=512)  # sums over 70 steps


@EVERY
def test_without_angles_and_last_inputs_it_is_mamba_2(scan, arguments):
    made = arguments(a=0, state=False, B_bias=None, C_bias=None)
    rate = made["A"][0, 0]
    made |= {"A": rate.expand_as(made["A"]), "trap": torch.ones_like(made["trap"])}
    y, state, *_ = scan(**made)
    x, B, C, z = (made[name][:, :, 0] for name in "xBCz")
    expected = ssd(x, made["dt"], rate, B, C, made["D"], z, return_final_state=True, implementation="reference")
    torch.testing.assert_close((y[:, :, 0], state), expected)


@EVERY
@pytest.mark.parametrize("r", [1, 2])
def test_cut_anywhere(r, scan, arguments):
    made = arguments(r=r, l=11)
    y, *states = scan(**made)
    for cut in (0, 1, 7, 11):
        first = {name: t[:, :cut] if name in TIMED else t for name, t in made.items()}
        rest = {name: t[:, cut:] if name in TIMED else t for name, t in made.items()}
        y_first, *between = scan(**first)
        rest |= {f"initial_{name}": t for name, t in zip(STATES, between, strict=True)}
        y_rest, *after = scan(**rest)
        torch.testing.assert_close(torch.cat([y_first, y_rest], dim=1), y)
        torch.testing.assert_close(after, states)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_step_by_step(implementation, interleaved, scan, arguments):
    made = arguments(r=2, l=5, interleaved=interleaved)
    y, *after = scan(**made)
    states = {name: made.pop(f"initial_{name}").clone() for name in STATES}
    for t in range(5):
        one = {name: a[:, t] if name in TIMED else a for name, a in made.items()}
        torch.testing.assert_close(mamba3_scan_step(**states, **one, implementation=implementation), y[:, t])
    torch.testing.assert_close(list(states.values()), after)


@EVERY
def test_packed_with_empty_sequences(scan, arguments, run):
    """As one by one, gradients included; of an empty sequence the states stay as they were."""
    borders = [0, 0, 4, 4, 9, 9]
    made = arguments(b=5, l=1)
    states = {name: made[name] for name in made if name.startswith("initial_")}
    packed = arguments(b=1) | states
    whole = run(scan, cu_seqlens=torch.tensor(borders, dtype=torch.int32), **packed)
    for i, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        one = {name: t[:, start:end] if name in TIMED else t for name, t in packed.items()}
        one |= {name: t[i : i + 1] for name, t in states.items()}
        outputs = scan(**one)
        torch.testing.assert_close(outputs[0], whole["output 0"][:, start:end])
        for k, state in enumerate(outputs[1:], 1):
            torch.testing.assert_close(state, whole[f"output {k}"][i : i + 1])
    by_reference = functools.partial(mamba3_scan, implementation="reference", return_final_state=True)
    expected = run(by_reference, cu_seqlens=torch.tensor(borders, dtype=torch.int32), **packed)
    for name, value in whole.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@EVERY
def test_large_angles_keep_their_place(scan, arguments):
    """The angle stays within a turn, so that long sequences lose no digits."""
    made = arguments(l=40, b=1, angles=torch.full((1, 40, 2), 1000.0, dtype=torch.float64), state=False)
    theta = scan(**made)[2]
    assert theta.abs().max() <= math.pi * (1 + 1e-12)
    exact = (made["dt"][..., None] * made["angles"][:, :, None]).sum(1)
    torch.testing.assert_close(torch.cos(theta), torch.cos(exact), atol=1e-9, rtol=0)


def test_many_inputs_a_step_go_another_way(arguments):
    """The native kernel holds whole steps in a chunk; with 17 inputs a step none of 256 does."""
    from ssmkernels import explain

    made = arguments(r=17, l=2, h=1, g=1)
    explanation = explain("mamba3_scan", **made)
    assert "cpu" not in explanation.able
    y = mamba3_scan(**made)
    torch.testing.assert_close(y, mamba3_scan(**made, implementation="reference"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": 4}, "`angles` must rotate at most the 7 dimensions of `B` and `C`"),
        ({"g": 3}, "the 3 groups of `B` and `C` must divide the 4 heads of `x`"),
        ({"chunk_size": 0}, "`chunk_size` must be"),
        ({"trap": torch.zeros(2, 9, 3, dtype=torch.float64)}, "`trap` must have shape"),
        ({"initial_key": torch.zeros(2, 1, 4, 6, dtype=torch.float64)}, "`initial_key` must have shape"),
    ],
    ids=str,
)
def test_refusals(changes, words, arguments):
    with pytest.raises(ValueError, match=r"mamba3_scan") as error:
        mamba3_scan(**arguments(**changes))
    assert words in str(error.value)
