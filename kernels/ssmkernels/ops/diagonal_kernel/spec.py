"""Cases, inputs and cost of the kernel of a diagonal state-space model."""

from __future__ import annotations

from typing import Any

import torch

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "d": 5,
    "n": 4,
    "length": 13,
    "complex": True,
    "real_maps": False,  # real B and C beside a complex A
    "discretization": "zoh",
    "dt": 0.1,
    "decay": 1.0,  # scale of the real part of -A
    "frequency": 3.0,  # scale of its imaginary part
}

ROWS = (
    {"length": 0},
    {"length": 1},
    {"length": 2},
    {"length": 15},
    {"length": 16},
    {"length": 17},
    {"length": 63},
    {"length": 64},
    {"length": 65},
    {"length": 257, "d": 2},
    {"length": 500, "d": 2},
    {"length": 1000, "d": 1, "n": 64},
    {"n": 1},
    {"n": 17},
    {"n": 64, "d": 2},
    {"d": 1},
    {"d": 33, "n": 2},
    {"complex": False},
    {"complex": False, "length": 65},
    {"real_maps": True},
    {"discretization": "bilinear"},
    {"discretization": "bilinear", "complex": False},
    {"discretization": "bilinear", "length": 65, "real_maps": True},
    {"discretization": "dss"},
    {"discretization": "dss", "complex": False},
    {"discretization": "dss", "length": 1},
    {"discretization": "dss", "length": 127, "d": 2, "real_maps": True},
    {"discretization": "dss", "decay": -1.0},  # it grows
    {"discretization": "dss", "decay": -100.0, "complex": False},
    {"discretization": "dss", "decay": 0.0, "frequency": 0.0},
    {"dt": 1e-4},
    {"dt": 3.0},
    {"decay": 0.0, "frequency": 0.0},  # A = 0: the limit of the zero-order hold
    {"decay": 1e-3},
    {"decay": 100.0},
    {"frequency": 300.0},
    {"layout": "strided"},
    {"layout": "strided", "complex": False},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    d, n = case["d"], case["n"]
    maps = draw.complex_normal if case["complex"] and not case["real_maps"] else draw.normal
    A = -draw.uniform(0.1, 1.0, d, n) * case["decay"]
    return {
        "A": torch.complex(A, draw.normal(d, n, scale=case["frequency"])) if case["complex"] else A,
        "B": maps(d, n),
        "C": maps(d, n),
        "dt": draw.uniform(0.5, 1.0, d) * case["dt"],
        "length": case["length"],
        "discretization": case["discretization"],
    }


def flops(case: Case) -> float:
    """A product and a sum for each tap and state: two, or with complex numbers four, as only the real part is kept."""
    return (4.0 if case["complex"] else 2.0) * case["d"] * case["n"] * case["length"]


SPECS = (Spec("diagonal_kernel", BASE, ROWS, make, flops, bench={"d": 256, "n": 32, "length": 16384, "dt": 0.01}),)
