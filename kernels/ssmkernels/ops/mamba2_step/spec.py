"""Cases, inputs and cost of one token of a Mamba-2 layer."""

from __future__ import annotations

import math
from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec

SIZES = {"b": 2, "m": 5, "h": 4, "p": 3, "n": 5, "g": 2, "w": 4}  # m is the width of the layer

BASE = {
    **SIZES,
    "mlp": 0,  # channels of the MLP beside the heads
    "D": "h",  # its shape in letters
    "bias": True,  # of the convolution
    "biases": True,  # of the outer projections
    "norm": True,
    "norm_groups": 1,
    "first": False,  # the norm before the gate
    "eps": 1e-5,
    "limit": (0.0, math.inf),
    "weights": "same",  # or "float32" beside half precision: all that may stay so
    "x": 1.0,  # scale of x and the convolution's state
    "dt": 1.0,  # scale of Δ's bias
}

ROWS: tuple[Case, ...] = (
    {"b": 1},
    {"b": 0},
    {"b": 9},
    {"h": 1, "g": 1},
    {"h": 6, "g": 3, "p": 5},
    {"g": 1},
    {"g": 4},
    {"p": 1},
    {"p": 7},
    {"p": 16, "n": 16, "m": 37},
    {"p": 33, "h": 2, "n": 17},
    {"n": 1},
    {"n": 33},
    {"w": 1},
    {"w": 2},
    {"w": 7},
    {"D": "hp"},
    {"mlp": 7},
    {"mlp": 16, "norm": False},
    {"bias": False},
    {"biases": False},
    {"norm": False},
    {"norm_groups": 4},
    {"norm_groups": 3, "first": True},
    {"first": True, "eps": 0.1},
    {"limit": (0.3, 0.9)},
    {"m": 1},
    {"m": 64, "h": 8, "p": 16, "n": 16, "b": 3},
    {"weights": "float32"},
    *({"x": size} for size in (1e2, 1e-3)),
    {"dt": 30.0},
    *({"layout": layout} for layout in ("strided", "far")),
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, m, h, p, n, g, w, mlp = (case[key] for key in ("b", "m", "h", "p", "n", "g", "w", "mlp"))
    d = h * p
    c = d + 2 * g * n
    rows = 2 * mlp + d + c + h
    return {
        "conv_state": draw.normal(b, w - 1, c, scale=case["x"]),
        "ssm_state": draw.normal(b, h, p, n),
        "x": draw.normal(b, m, scale=case["x"]),
        "in_proj": draw.normal(rows, m, scale=m**-0.5),
        "in_bias": draw.normal(rows) if case["biases"] else None,
        "conv_weight": draw.normal(c, w, scale=w**-0.5),
        "conv_bias": draw.normal(c) if case["bias"] else None,
        "dt_bias": draw.normal(h, scale=case["dt"]),
        "A_log": draw.uniform(-1.0, 2.0, h),
        "D": draw.normal(*(case[letter] for letter in case["D"])),
        "norm_weight": draw.normal(d) if case["norm"] else None,
        "out_proj": draw.normal(m, mlp + d, scale=(mlp + d) ** -0.5),
        "out_bias": draw.normal(m) if case["biases"] else None,
        "dt_limit": case["limit"],
        "norm_groups": case["norm_groups"],
        "norm_before_gate": case["first"],
        "norm_eps": case["eps"],
    }


def flops(case: Case) -> float:
    """Two for each tap and each weight of the projections, five for each state."""
    b, m, h, p, n, g, w, mlp = (case[key] for key in ("b", "m", "h", "p", "n", "g", "w", "mlp"))
    d = h * p
    c = d + 2 * g * n
    return b * (2.0 * (m * (3 * mlp + 2 * d + c + h) + c * w) + 5.0 * d * n)


BENCH = {"b": 1, "m": 768, "h": 24, "p": 64, "n": 128, "g": 1, "biases": False}
SPECS = (Spec("mamba2_step", BASE, ROWS, make, flops, BENCH, differentiable=False),)
