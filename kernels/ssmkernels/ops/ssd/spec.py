"""Cases, inputs and cost of the state-space dual and its step."""

from __future__ import annotations

import math
from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

SCALES = {"delta": 1.0, "decay": 1.0, "x": 1.0}  # of the step sizes, A and x

BASE = {
    "b": 2,
    "l": 13,
    "h": 4,
    "p": 3,
    "n": 5,
    "g": 2,
    "D": "h",  # its shape in letters; "" for none
    "z": True,
    "bias": True,
    "softplus": True,
    "limit": (0.0, math.inf),
    "chunk": None,
    "state": True,
    "packed": False,
    "weights": "float32",  # of A, D and the bias beside half precision; or "same"
    **SCALES,
}

ROWS: tuple[Case, ...] = (
    {"D": "", "z": False, "bias": False, "softplus": False, "state": False},
    *({"l": l} for l in (0, 1, 2)),
    {"l": 63, "h": 2, "g": 1},
    {"l": 64, "h": 2, "g": 1},
    {"l": 65, "h": 2, "g": 1},
    {"l": 140, "b": 1, "h": 1, "g": 1},
    {"chunk": 1},
    {"chunk": 4},
    {"chunk": 16, "l": 50},
    {"chunk": 128, "l": 140, "b": 1, "h": 1, "g": 1},
    {"h": 1, "g": 1},
    {"h": 11, "g": 1},
    {"h": 6, "g": 3},
    {"g": 4},
    {"p": 1},
    {"p": 7},
    {"p": 16, "n": 16},
    {"p": 33, "h": 2},
    {"p": 64, "n": 128, "b": 1, "h": 2, "g": 1},
    {"n": 1},
    {"n": 16},
    {"n": 33},
    {"D": "hp"},
    {"D": ""},
    *({name: False} for name in ("z", "bias", "softplus", "state")),
    {"limit": (0.3, 0.9)},
    {"limit": (0.3, 0.9), "softplus": False, "bias": False},
    {"limit": (0.5, 0.5)},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 90, "h": 2, "g": 1, "state": False, "D": "hp"},
    {"b": 1, "packed": True, "l": 21, "limit": (0.3, 0.9), "chunk": 4},
    {"weights": "same"},
    {"delta": 1e-4},
    {"delta": 30.0},
    {"decay": 1e-3},
    {"decay": 100.0},
    {"x": 1e3},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "l": 3, "h": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, p, n, g = (case[key] for key in "blhpng")
    dt = draw.normal(b, l, h) if case["softplus"] else draw.uniform(-0.2, 1.2, b, l, h)
    return {
        "x": draw.normal(b, l, h, p, scale=case["x"]),
        "dt": dt * case["delta"],
        "A": -draw.uniform(0.1, 1.0, h) * case["decay"],
        "B": draw.normal(b, l, g, n),
        "C": draw.normal(b, l, g, n),
        "D": draw.normal(*(case[letter] for letter in case["D"])) if case["D"] else None,
        "z": draw.normal(b, l, h, p) if case["z"] else None,
        "dt_bias": draw.normal(h) if case["bias"] else None,
        "dt_softplus": case["softplus"],
        "dt_limit": case["limit"],
        "chunk_size": case["chunk"],
        **draw.carried(case, initial_state=(h, p, n)),
    }


def flops(case: Case) -> float:
    """Five for each state and token: the decay, the outer product's multiply-add, the output's."""
    return 5.0 * case["b"] * case["l"] * case["h"] * case["p"] * case["n"]


WHOLE = Spec("ssd", BASE, ROWS, make, flops, bench={"b": 1, "l": 2048, "h": 24, "p": 64, "n": 128, "g": 1})
SPECS = (WHOLE, step_of(WHOLE, without=("chunk",)))
