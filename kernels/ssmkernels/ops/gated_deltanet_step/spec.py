"""Cases, inputs and cost of one token of a gated DeltaNet layer."""

from __future__ import annotations

from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec

SIZES = {"b": 2, "m": 5, "h": 4, "g": 2, "k": 5, "v": 3, "w": 4}  # m is the width of the layer

BASE = {
    **SIZES,
    "beta_scale": 1.0,
    "eps": 1e-5,
    "weights": "same",  # or "float32" beside half precision: all that may stay so
    "x": 1.0,  # scale of x and the convolutions' states
}

ROWS: tuple[Case, ...] = (
    {"b": 1},
    {"b": 0},
    {"b": 9},
    {"h": 1, "g": 1},
    {"h": 6, "g": 3, "k": 7},
    {"g": 4},
    {"k": 1, "v": 1},
    {"v": 7},
    {"k": 16, "v": 16, "m": 37},
    {"k": 17, "v": 70, "h": 2},
    {"w": 1},
    {"w": 7},
    {"beta_scale": 2.0},
    {"eps": 0.1},
    {"m": 1},
    {"m": 64, "h": 8, "k": 16, "v": 16, "b": 3},
    {"weights": "float32"},
    *({"x": size} for size in (1e2, 1e-3)),
    *({"layout": layout} for layout in ("strided", "far")),
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, m, h, g, k, v, w = (case[key] for key in "bmhgkvw")
    i, j = g * k, h * v

    def matrix(rows: int, columns: int) -> Any:
        return draw.normal(rows, columns, scale=columns**-0.5)

    return {
        "q_state": draw.normal(b, w - 1, i, scale=case["x"]),
        "k_state": draw.normal(b, w - 1, i, scale=case["x"]),
        "v_state": draw.normal(b, w - 1, j, scale=case["x"]),
        "state": draw.normal(b, h, k, v),
        "x": draw.normal(b, m, scale=case["x"]),
        "q_proj": matrix(i, m),
        "k_proj": matrix(i, m),
        "v_proj": matrix(j, m),
        "g_proj": matrix(j, m),
        "b_proj": matrix(h, m),
        "a_proj": matrix(h, m),
        "q_conv": matrix(i, w),
        "k_conv": matrix(i, w),
        "v_conv": matrix(j, w),
        "A_log": draw.uniform(-1.0, 2.0, h),
        "dt_bias": draw.normal(h),
        "norm_weight": draw.normal(v),
        "o_proj": matrix(m, j),
        "beta_scale": case["beta_scale"],
        "norm_eps": case["eps"],
    }


def flops(case: Case) -> float:
    """Two for each tap and each weight of the projections, seven for each number of the state."""
    b, m, h, g, k, v, w = (case[key] for key in "bmhgkvw")
    i, j = g * k, h * v
    return b * (2.0 * (m * (2 * i + 3 * j + 2 * h) + (2 * i + j) * w) + 7.0 * h * k * v)


BENCH = {"b": 1, "m": 768, "h": 6, "g": 6, "k": 128, "v": 256}
SPECS = (Spec("gated_deltanet_step", BASE, ROWS, make, flops, BENCH, differentiable=False),)
