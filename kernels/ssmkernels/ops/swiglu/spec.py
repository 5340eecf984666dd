"""Cases, inputs and cost of the gated product."""

from __future__ import annotations

import math
from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "shape": (2, 5, 12),
    "scale": 0.7,
    "gate": 2.0,  # scale of the gate's numbers
}

ROWS = (
    {"scale": 1.0},
    {"scale": 0.0},
    {"scale": -1.5},
    {"gate": 50.0},
    {"gate": 0.0},
    {"shape": (12,)},
    {"shape": (3, 12)},
    {"shape": (2, 3, 2, 12)},
    {"shape": (2, 0, 12)},
    {"shape": (0, 3, 12)},
    {"shape": (2, 3, 0)},
    {"shape": (2, 1, 12)},
    {"shape": (3, 2, 1)},
    {"shape": (2, 2, 63)},
    {"shape": (2, 2, 64)},
    {"shape": (2, 2, 65)},
    {"shape": (1, 2, 1000)},
    {"shape": (70, 12)},
    {"layout": "strided"},
    {"layout": "far", "shape": (1, 3, 4)},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    shape = case["shape"]
    return {"gate": draw.normal(*shape, scale=case["gate"]), "up": draw.normal(*shape), "scale": case["scale"]}


def flops(case: Case) -> float:
    """An exponential of eight, a division, and four more for each element."""
    return 13.0 * math.prod(case["shape"])


SPECS = (Spec("swiglu", BASE, ROWS, make, flops, bench={"shape": (1, 2048, 2048), "scale": 1.0}),)
