"""Cases, inputs and cost of the selective scan and its step."""

from __future__ import annotations

from typing import Any

import torch

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

SCALES = {"delta": 1.0, "decay": 1.0, "x": 1.0}  # of the step sizes, A and u

BASE = {
    "b": 2,
    "l": 13,
    "d": 6,
    "n": 4,
    "g": None,  # groups of B and C; None for (b l n)
    "fixed": "",  # which of B and C have no time
    "complex": False,
    "real_maps": False,  # real B and C beside a complex A
    "frequency": 1.0,  # scale of a complex A's imaginary part
    "D": True,
    "z": True,
    "bias": True,
    "softplus": True,
    "state": True,
    "packed": False,
    "weights": "float32",  # of A, D and the bias beside half precision; or "same"
    **SCALES,
}

ROWS: tuple[Case, ...] = (
    {"D": False, "z": False, "bias": False, "softplus": False, "state": False},
    *({"l": l} for l in (0, 1, 2)),
    {"l": 63, "d": 3},
    {"l": 64, "d": 3},
    {"l": 65, "d": 3},
    {"l": 200, "b": 1, "d": 2},
    {"n": 1},
    {"n": 16, "d": 5},
    {"n": 17},
    {"n": 64, "d": 2},
    {"d": 1},
    {"d": 33},
    {"g": 1},
    {"g": 3},
    {"g": 6},
    {"fixed": "BC"},
    {"fixed": "B"},
    {"fixed": "C", "g": 2},
    {"fixed": "C", "b": 1, "packed": True, "l": 21},
    {"complex": True},
    {"complex": True, "fixed": "BC"},
    {"complex": True, "fixed": "B", "g": 3},
    {"complex": True, "fixed": "C"},
    {"complex": True, "real_maps": True},
    {"complex": True, "b": 1, "packed": True, "l": 21, "g": 2},
    {"complex": True, "b": 1, "packed": True, "l": 21, "state": False, "fixed": "BC", "real_maps": True},
    {"complex": True, "n": 1},
    {"complex": True, "n": 17},
    {"complex": True, "n": 64, "d": 2, "z": False},
    {"complex": True, "l": 65, "d": 33, "b": 1},
    {"complex": True, "frequency": 1e3},
    {"complex": True, "frequency": 1e3, "decay": 1e-3},
    {"complex": True, "delta": 30.0},
    {"complex": True, "layout": "strided"},
    *({name: False} for name in ("z", "D", "bias", "softplus", "state")),
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 21, "state": False, "g": 2},
    {"weights": "same"},
    *({"delta": size} for size in (1e-4, 30.0)),
    *({"decay": size} for size in (1e-3, 100.0)),
    {"x": 1e3},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "l": 3, "d": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, d, n, g = (case[key] for key in "bldng")
    number = draw.complex_normal if case["complex"] else draw.normal
    map_number = draw.normal if case["real_maps"] else number
    timed = (b, l, n) if g is None else (b, l, g, n)
    A = -draw.uniform(0.1, 1.0, d, n) * case["decay"]
    delta = draw.normal(b, l, d) if case["softplus"] else draw.uniform(0.05, 0.5, b, l, d)
    return {
        "u": draw.normal(b, l, d, scale=case["x"]),
        "delta": delta * case["delta"],
        "A": torch.complex(A, draw.normal(d, n, scale=case["frequency"])) if case["complex"] else A,
        "B": map_number(*((d, n) if "B" in case["fixed"] else timed)),
        "C": map_number(*((d, n) if "C" in case["fixed"] else timed)),
        "D": draw.normal(d) if case["D"] else None,
        "z": draw.normal(b, l, d) if case["z"] else None,
        "delta_bias": draw.normal(d) if case["bias"] else None,
        "delta_softplus": case["softplus"],
        **draw.carried(case, number, initial_state=(d, n)),
    }


def flops(case: Case) -> float:
    """Six for each state and step: Δ·A and its exponential counted as one each, decay, input, output.

    Complex ones count as twenty: a product of two is six, the exponential is one with sine and cosine beside it.
    """
    return (20.0 if case["complex"] else 6.0) * case["b"] * case["l"] * case["d"] * case["n"]


def wide(case: Case) -> tuple[str, ...]:
    return ("A", "D", "delta_bias") if case["weights"] == "float32" else ()


BENCH = {"b": 1, "l": 512, "d": 1536, "n": 16}
WHOLE = Spec("selective_scan", BASE, ROWS, make, flops, BENCH, wide=lambda case: (*wide(case), "initial_state"))
SPECS = (WHOLE, step_of(WHOLE, without=("fixed",)))
