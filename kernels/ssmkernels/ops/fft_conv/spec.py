"""Cases, inputs and cost of the long convolution."""

from __future__ import annotations

import math
from typing import Any

import torch

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "b": 2,
    "l": 13,
    "d": 4,
    "l_k": 13,
    "l_r": None,  # taps into the future; None for no such kernel
    "D": True,
    "gate": False,
    "packed": False,
    "weights": "same",  # or "float32" beside half precision
    "decay": 0.1,  # of the kernels, per tap
    "x": 1.0,  # scale of u
}

ROWS: tuple[Case, ...] = (
    {"D": False},
    *({"l": l} for l in (0, 1, 2)),
    {"l": 63, "l_k": 63, "d": 2},
    {"l": 64, "l_k": 64, "d": 2},
    {"l": 65, "l_k": 65, "d": 2},
    {"l": 200, "l_k": 200, "b": 1, "d": 2},
    {"l": 180, "l_k": 180, "l_r": 180, "b": 1, "d": 2},
    {"l": 700, "l_k": 700, "b": 1, "d": 1},
    {"l": 700, "l_k": 9, "l_r": 4, "b": 1, "d": 2, "gate": True},
    {"l": 128, "l_k": 5, "d": 2},
    {"l_k": 0},
    {"l_k": 1},
    {"l_k": 4},
    {"l_k": 30},
    {"l_r": 0},
    {"l_r": 1},
    {"l_r": 12},
    {"l_r": 30, "l_k": 3},
    {"l_r": 13, "l": 64, "d": 2},
    {"d": 1},
    {"d": 17},
    {"b": 1},
    {"b": 5},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 21, "l_r": 7, "D": False},
    {"b": 1, "packed": True, "l": 300, "l_k": 300, "d": 1},
    {"gate": True},
    {"gate": True, "l_r": 12, "D": False},
    {"gate": True, "b": 1, "packed": True, "l": 21},
    {"gate": True, "layout": "strided", "weights": "float32"},
    {"gate": True, "l": 200, "l_k": 200, "b": 1, "d": 2},
    {"gate": True, "l": 1},
    {"weights": "float32"},
    {"decay": 0.0, "l": 40, "l_k": 40},
    {"decay": 3.0},
    {"x": 1e3},
    {"x": 1e-3},
    {"layout": "strided", "l_r": 5},
    {"layout": "far", "b": 1, "l": 7, "d": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, d = (case[key] for key in "bld")

    def taps(count: int) -> torch.Tensor:
        return draw.normal(d, count) * torch.exp(-case["decay"] * torch.arange(count))

    return {
        "u": draw.normal(b, l, d, scale=case["x"]),
        "kernel": taps(case["l_k"]),
        "D": draw.normal(d) if case["D"] else None,
        "kernel_reverse": None if case["l_r"] is None else taps(case["l_r"]),
        "gate": draw.normal(b, l, d) if case["gate"] else None,
        "cu_seqlens": draw.borders(l) if case["packed"] else None,
    }


def flops(case: Case) -> float:
    """By FFT: 2.5 n log₂ n for each real transform of n points, six for each product of two complex numbers."""
    b, l, d = (case[key] for key in "bld")
    n = max(2, l + max(min(case["l_k"], l), min(case["l_r"] or 0, l)))
    transforms = 2 * b * d + d
    return transforms * 2.5 * n * math.log2(n) + 3.0 * b * d * n


SPECS = (Spec("fft_conv", BASE, ROWS, make, flops, bench={"b": 1, "l": 4096, "l_k": 4096, "d": 256, "decay": 0.001}),)
