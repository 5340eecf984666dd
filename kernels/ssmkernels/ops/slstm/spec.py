"""Cases, inputs and cost of the scalar memory and its step."""

from __future__ import annotations

from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

BASE = {
    "b": 2,
    "l": 13,
    "h": 3,
    "p": 5,
    "bias": True,
    "state": True,
    "packed": False,
    "weights": "float32",  # of R and the bias beside half precision; or "same"
    "x": 1.0,  # scale of x
    "f": 1.0,  # added to the forget gate's
}

ROWS = (
    {"l": 0},
    {"l": 1},
    {"l": 17},
    {"l": 2, "state": False},
    {"l": 40, "b": 1, "h": 1},
    {"b": 9, "h": 1, "l": 5},
    {"b": 17, "h": 1, "l": 12},
    {"p": 1},
    {"p": 8},
    {"p": 16, "l": 9},
    {"p": 33, "h": 2, "l": 9},
    {"bias": False},
    {"state": False},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 40, "h": 1, "state": False, "bias": False},
    {"weights": "same"},
    {"x": 0.0},
    {"x": 10.0, "l": 9},
    {"x": 1e3},  # gates far apart: what cancels between i, f and m is exactly 0
    {"f": -5.0},
    {"f": 8.0},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "l": 3, "h": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, p = (case[key] for key in "blhp")
    borders, s = draw.sequences(case)
    x = draw.normal(b, l, 4, h, p, scale=case["x"])
    x[:, :, 1] += case["f"]
    made = {
        "x": x,
        "R": draw.normal(h, p, 4, p, scale=0.7 * p**-0.5),
        "bias": draw.normal(h, 4, p) if case["bias"] else None,
        "initial_c": draw.normal(s, h, p),
        "initial_n": draw.uniform(1.0, 2.0, s, h, p),
        "initial_h": draw.uniform(-1.0, 1.0, s, h, p),
        "initial_m": draw.normal(s, h, p),
    }
    if not case["state"]:
        made |= {name: None for name in made if name.startswith("initial_")}
    return made | {"return_final_state": True, "cu_seqlens": borders}


def flops(case: Case) -> float:
    """Two for each recurrent weight, head by head, and twenty for each channel."""
    return case["b"] * case["l"] * case["h"] * case["p"] * (8.0 * case["p"] + 20.0)


WHOLE = Spec(
    "slstm",
    BASE,
    ROWS,
    make,
    flops,
    bench={"b": 8, "l": 512, "h": 4, "p": 128, "state": False},
    exact=("cpu",),  # in Triton sequences are rows of a product, which NumPy takes in the interpreter
)
SPECS = (WHOLE, step_of(WHOLE, bench={"b": 1}))
