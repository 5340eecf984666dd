"""Cases, inputs and cost of the causal convolution and its step."""

from __future__ import annotations

from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

BASE = {
    "b": 2,
    "l": 13,
    "d": 6,
    "w": 4,
    "bias": True,
    "activation": "silu",
    "state": True,
    "packed": False,
    "weights": "same",  # or "float32" beside half precision
    "x": 1.0,  # scale of x
}

ROWS = (
    {"bias": False, "activation": None, "state": False},
    {"l": 0},
    {"l": 1},
    {"l": 2},  # shorter than the state
    {"l": 63},
    {"l": 64},
    {"l": 65},
    {"l": 200, "b": 1, "d": 3},
    {"w": 1},
    {"w": 2},
    {"w": 3},
    {"w": 5},
    {"w": 9, "l": 5},
    {"d": 1},
    {"d": 16},
    {"d": 33},
    {"b": 1},
    {"b": 5},
    {"bias": False},
    {"activation": None},
    {"state": False},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 21, "state": False, "d": 17},
    {"weights": "float32"},
    {"x": 1e3},
    {"x": 1e-3},
    {"layout": "strided"},
    {"layout": "strided", "b": 1, "packed": True, "l": 21},
    {"layout": "far", "b": 1, "l": 7, "d": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, d, w = (case[key] for key in "bldw")
    borders, s = draw.sequences(case)
    return {
        "x": draw.normal(b, l, d, scale=case["x"]),
        "weight": draw.normal(d, w),
        "bias": draw.normal(d) if case["bias"] else None,
        "activation": case["activation"],
        "initial_state": draw.normal(s, w - 1, d, scale=case["x"]) if case["state"] else None,
        "return_final_state": True,
        "cu_seqlens": borders,
    }


def flops(case: Case) -> float:
    """A multiplication and an addition for each tap."""
    return 2.0 * case["b"] * case["l"] * case["d"] * case["w"]


WHOLE = Spec("causal_conv1d", BASE, ROWS, make, flops, bench={"b": 1, "l": 512, "d": 1536})
SPECS = (WHOLE, step_of(WHOLE))
