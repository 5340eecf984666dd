"""Cases, inputs and cost of one token of a Mamba layer."""

from __future__ import annotations

from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec

SIZES = {"b": 2, "m": 5, "d": 6, "n": 4, "w": 4, "r": 3}  # m is the width of the layer, r the rank of Δ

BASE = {
    **SIZES,
    "bias": True,  # of the convolution
    "biases": True,  # of the outer projections
    "norm_eps": None,
    "weights": "same",  # or "float32" beside half precision: convolution, biases, A and D
    "x": 1.0,  # scale of x and the convolution's state
    "dt": 1.0,  # scale of what Δ's bias is added to
}

ROWS: tuple[Case, ...] = (
    {"b": 1},
    {"b": 0},
    {"b": 9},
    {"b": 17, "d": 20},
    {"d": 1},
    {"d": 16},
    {"d": 65},
    {"d": 130, "n": 16, "r": 9},
    {"n": 1},
    {"n": 16},
    {"n": 17},
    {"n": 64, "d": 3},
    {"w": 1},
    {"w": 2},
    {"w": 7},
    {"r": 1},
    {"r": 16},
    {"r": 33},
    {"bias": False},
    {"biases": False},
    {"m": 1},
    {"m": 64, "d": 128, "b": 3},
    {"m": 37, "d": 33},
    {"norm_eps": 1e-6},
    {"norm_eps": 0.1, "n": 16, "r": 17, "b": 3},
    {"weights": "float32"},
    {"weights": "float32", "norm_eps": 1e-5},
    *({"x": size} for size in (1e2, 1e-3)),
    {"dt": 30.0},
    *({"layout": layout} for layout in ("strided", "far")),
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, m, d, n, w, r = (case[key] for key in "bmdnwr")
    return {
        "conv_state": draw.normal(b, w - 1, d, scale=case["x"]),
        "ssm_state": draw.normal(b, d, n),
        "x": draw.normal(b, m, scale=case["x"]),
        "in_proj": draw.normal(2 * d, m, scale=m**-0.5),
        "in_bias": draw.normal(2 * d) if case["biases"] else None,
        "conv_weight": draw.normal(d, w, scale=w**-0.5),
        "conv_bias": draw.normal(d) if case["bias"] else None,
        "x_proj": draw.normal(r + 2 * n, d, scale=d**-0.5),
        "dt_proj": draw.normal(d, r, scale=case["dt"] * r**-0.5),
        "dt_bias": draw.normal(d),
        "A_log": draw.uniform(-1.0, 2.0, d, n),
        "D": draw.normal(d),
        "out_proj": draw.normal(m, d, scale=d**-0.5),
        "out_bias": draw.normal(m) if case["biases"] else None,
        "norm_eps": case["norm_eps"],
    }


def flops(case: Case) -> float:
    """Two for each tap and each weight of the projections, eight for each state."""
    b, m, d, n, w, r = (case[key] for key in "bmdnwr")
    return b * d * (2.0 * (3 * m + w + r + 2 * n + r) + 8.0 * n)


BENCH = {"b": 1, "m": 768, "d": 1536, "n": 16, "r": 48, "biases": False}
SPECS = (Spec("mamba_step", BASE, ROWS, make, flops, BENCH, differentiable=False),)
