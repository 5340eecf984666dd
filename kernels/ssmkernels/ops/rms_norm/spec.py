"""Cases, inputs and cost of root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "shape": (2, 5, 12),
    "gate": True,
    "before": True,  # whether the norm comes before the gate
    "group_size": None,
    "residual": "same",  # None, "same" for x's dtype, or "float32"
    "weights": "same",  # or "float32" beside half precision
    "eps": 1e-5,
    "x": 1.0,  # scale of x
}

ROWS = (
    {"gate": False, "residual": None},
    {"gate": False},
    {"before": False},
    {"residual": None},
    {"residual": None, "before": False, "group_size": 4},
    {"residual": "float32"},
    {"weights": "float32"},
    {"residual": "float32", "weights": "float32", "gate": False},
    {"group_size": 12},
    {"group_size": 4},
    {"group_size": 1},
    {"group_size": 3, "before": False},
    {"shape": (12,)},
    {"shape": (3, 12)},
    {"shape": (2, 3, 2, 12)},
    {"shape": (2, 0, 12)},
    {"shape": (2, 1, 12)},
    {"shape": (0, 3, 12)},
    {"shape": (3, 2, 1)},
    {"shape": (3, 2, 2)},
    {"shape": (2, 2, 63)},
    {"shape": (2, 2, 64)},
    {"shape": (2, 2, 65)},
    {"shape": (1, 2, 1000)},
    {"shape": (70, 12)},
    {"eps": 0.1},
    {"x": 1e3},
    {"x": 1e-4},
    {"x": 0.0, "residual": None},
    {"layout": "strided"},
    {"layout": "strided", "before": False, "residual": "float32"},
    {"layout": "far", "shape": (1, 3, 4)},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    shape = case["shape"]
    return {
        "x": draw.normal(*shape, scale=case["x"]),
        "weight": draw.normal(shape[-1]),
        "eps": case["eps"],
        "gate": draw.normal(*shape) if case["gate"] else None,
        "norm_before_gate": case["before"],
        "group_size": case["group_size"],
        "residual": draw.normal(*shape, scale=case["x"]) if case["residual"] else None,
    }


def flops(case: Case) -> float:
    """Square, sum, division and weight, for each element; two more for each of gate and residual."""
    elements = 1.0
    for size in case["shape"]:
        elements *= size
    return elements * (4 + 2 * bool(case["gate"]) + 2 * bool(case["residual"]))


def wide(case: Case) -> list[str]:
    return ["weight"] * (case["weights"] == "float32") + ["residual"] * (case["residual"] == "float32")


SPECS = (Spec("rms_norm", BASE, ROWS, make, flops, bench={"shape": (1, 2048, 768), "gate": False}, wide=wide),)
