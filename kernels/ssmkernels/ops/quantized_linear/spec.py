"""Cases, inputs and cost of linear maps with quantised weights."""

from __future__ import annotations

from typing import Any

import torch

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "b": 2,
    "l": 2,
    "k": 70,  # inputs
    "o": 6,  # outputs
    "bits": "4",  # or "8", or "same": floating-point weights in x's dtype
    "group_size": 32,
    "zeros": True,
    "bias": True,
    "activations": None,  # or "int8"
    "weights": "same",  # or "float32" beside half precision: scales and bias
}

ROWS = (
    {"bits": "8", "zeros": False},
    {"bits": "8", "zeros": False, "group_size": None, "o": 67},
    {"bits": "same", "zeros": False, "group_size": None},
    {"bits": "same", "zeros": False, "group_size": None, "l": 9, "k": 5},
    {"zeros": False},
    {"bias": False},
    {"group_size": None},
    {"group_size": 64, "k": 130},
    {"group_size": 96, "k": 192, "o": 70},
    {"group_size": 128, "k": 300, "o": 9, "b": 1, "l": 1},
    {"activations": "int8"},
    {"activations": "int8", "group_size": 64, "k": 130, "bias": False},
    {"activations": "int8", "group_size": None, "k": 300, "o": 9, "zeros": False, "layout": "strided"},
    {"activations": "int8", "group_size": 128, "k": 300, "l": 9},
    {"weights": "float32"},
    {"weights": "float32", "bits": "8", "zeros": False, "group_size": None, "k": 33},
    {"k": 1},
    {"k": 31},
    {"k": 256},
    {"k": 0},
    {"o": 1},
    {"o": 0},
    {"l": 0},
    {"l": 1},
    {"l": 8},
    {"l": 9},
    {"b": 1, "l": 40, "o": 67, "bits": "8", "zeros": False},
    {"layout": "strided"},
    {"layout": "far", "o": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    k, o, group, bits = (case[key] for key in ("k", "o", "group_size", "bits"))
    groups = 1 if group is None else -(-k // group)
    columns = {"8": k, "4": -(-k // 32) * 16, "same": k}[bits]
    if bits == "same":
        weight = draw.normal(o, k, scale=max(k, 1) ** -0.5)
    else:
        low, high = (-127, 128) if bits == "8" else (0, 256)
        weight = draw.uniform(low, high, o, columns).floor().to(torch.int8 if bits == "8" else torch.uint8)
    steps = {"8": 127.0, "4": 8.0, "same": 1.0}[bits]
    return {
        "x": draw.normal(case["b"], case["l"], k),
        "weight": weight,
        "scales": None if bits == "same" else draw.uniform(0.5, 1.5, o, groups) / steps,
        "zeros": draw.uniform(0, 16, o, groups).to(torch.uint8) if case["zeros"] else None,
        "bias": draw.normal(o) if case["bias"] else None,
        "group_size": group,
        "activations": case["activations"],
    }


def wide(case: Case) -> tuple[str, ...]:
    return ("scales", "bias") if case["weights"] == "float32" else ()


def flops(case: Case) -> float:
    """Two for each weight and row."""
    return 2.0 * case["b"] * case["l"] * case["k"] * case["o"]


BENCH = {"b": 1, "l": 1, "k": 768, "o": 3072, "group_size": 64, "bias": False}
SPECS = (Spec("quantized_linear", BASE, ROWS, make, flops, BENCH, wide=wide, exact=()),)
