"""Cases, inputs and cost of the real-gated linear recurrent unit's gates."""

from __future__ import annotations

from typing import Any

import torch

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "b": 2,
    "l": 7,
    "h": 3,
    "p": 6,
    "first": True,
    "decay": 4.0,  # |log_decay| is at most this
    "weights": "same",  # or "float32" beside half precision
}

ROWS = (
    {"first": False},
    {"weights": "float32"},
    {"decay": 1e-3},
    {"decay": 1e-6, "weights": "float32"},
    {"decay": 200.0},
    {"l": 0},
    {"l": 1},
    {"b": 0},
    {"b": 1, "l": 70, "h": 1},
    {"p": 1},
    {"p": 8},
    {"p": 33, "h": 1},
    {"p": 64, "l": 3},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "h": 1, "p": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, p = (case[key] for key in "blhp")
    first = torch.zeros(b, l, dtype=torch.int32)
    if case["first"]:
        first[:, ::3] = 1
    return {
        "x": draw.normal(b, l, h, p),
        "gates": draw.normal(b, l, h, 2 * p, scale=2.0),
        "log_decay": -case["decay"] * draw.uniform(0.1, 1.0, h, p),
        "first": first if case["first"] else None,
    }


def flops(case: Case) -> float:
    """Two sigmoids, two exponentials and a root, a division each or as much, and seven more, for each channel."""
    return 27.0 * case["b"] * case["l"] * case["h"] * case["p"]


SPECS = (Spec("rglru_gates", BASE, ROWS, make, flops, bench={"b": 1, "l": 2048, "h": 10, "p": 256}),)
