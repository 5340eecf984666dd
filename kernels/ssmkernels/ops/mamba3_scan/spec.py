"""Cases, inputs and cost of Mamba-3's recurrence and its step."""

from __future__ import annotations

from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

BASE = {
    "b": 2,
    "l": 6,
    "r": 1,
    "h": 4,
    "p": 3,
    "n": 6,
    "g": 2,
    "a": 2,
    "D": True,
    "z": True,
    "bias": True,
    "interleaved": True,
    "chunk": None,
    "state": True,
    "packed": False,
    "weights": "float32",  # of step sizes, rates, angles, biases and D beside half precision; or "same"
    "delta": 1.0,  # scale of the step sizes
    "decay": 1.0,  # scale of A
    "trap": (0.0, 1.0),  # λ lies between them
}

ROWS = (
    {"D": False, "z": False, "bias": False, "state": False},
    {"l": 0},
    {"l": 1},
    {"l": 11},
    {"chunk": 16, "l": 70, "b": 1, "h": 1, "g": 1},
    {"r": 2},
    {"r": 4, "interleaved": False, "b": 1},
    {"r": 3, "l": 23, "h": 1, "g": 1, "b": 1},
    {"r": 2, "l": 1, "state": False},
    {"r": 2, "b": 1, "packed": True, "l": 12, "interleaved": False},
    {"chunk": 4},
    {"chunk": 16, "l": 36, "r": 2, "h": 1, "g": 1, "b": 1},
    {"h": 1, "g": 1},
    {"g": 4},
    {"p": 1},
    {"p": 7},
    {"p": 16, "n": 16, "a": 8},
    {"p": 64, "n": 128, "a": 32, "b": 1, "h": 2, "g": 1},
    {"n": 2, "a": 1},
    {"n": 7, "a": 3},
    {"n": 7, "a": 3, "interleaved": False},
    {"n": 33, "a": 9},
    {"a": 0},
    {"D": False},
    {"z": False},
    {"bias": False},
    {"state": False},
    {"interleaved": False},
    {"b": 1, "packed": True, "l": 16},
    {"b": 1, "packed": True, "l": 21, "h": 2, "g": 1, "state": False},
    {"weights": "same"},
    {"delta": 1e-4},
    {"delta": 10.0},
    {"decay": 1e-3},
    {"decay": 100.0},
    {"trap": (0.0, 0.0)},
    {"trap": (1.0, 1.0)},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "l": 3, "h": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, r, h, p, n, g, a = (case[key] for key in "blrhpnga")
    borders, s = draw.sequences(case)
    state, bias = case["state"], case["bias"]
    return {
        "x": draw.normal(b, l, r, h, p),
        "dt": draw.uniform(0.0, 1.0, b, l, h) * case["delta"],
        "A": -draw.uniform(0.1, 1.0, b, l, h) * case["decay"],
        "B": draw.normal(b, l, r, g, n),
        "C": draw.normal(b, l, r, g, n),
        "trap": draw.uniform(*case["trap"], b, l, h),
        "angles": draw.uniform(-3.0, 3.0, b, l, a),
        "B_bias": draw.normal(h, r, n) if bias else None,
        "C_bias": draw.normal(h, r, n) if bias else None,
        "D": draw.normal(h) if case["D"] else None,
        "z": draw.normal(b, l, r, h, p) if case["z"] else None,
        "interleaved": case["interleaved"],
        "chunk_size": case["chunk"],
        "initial_state": draw.normal(s, h, p, n) if state else None,
        "initial_angle": draw.uniform(-3.0, 3.0, s, h, a) if state else None,
        "initial_key": draw.normal(s, r, h, n) if state else None,
        "initial_value": draw.normal(s, r, h, p) if state else None,
        "return_final_state": True,
        "cu_seqlens": borders,
    }


def flops(case: Case) -> float:
    """Of each step: three a state for the decay and the skipped half of the last input, four a state and input."""
    return (3.0 + 4.0 * case["r"]) * case["b"] * case["l"] * case["h"] * case["p"] * case["n"]


WHOLE = Spec(
    "mamba3_scan",
    BASE,
    ROWS,
    make,
    flops,
    bench={"b": 1, "l": 2048, "h": 24, "p": 64, "n": 128, "g": 1, "a": 32},
    exact=("cpu",),  # in Triton, PyTorch's products make the outputs of a step's own inputs
)
SPECS = (WHOLE, step_of(WHOLE, without=("chunk",)))
