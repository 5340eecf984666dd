"""Cases, inputs and cost of the kernel of a diagonal plus low-rank state-space model."""

from __future__ import annotations

from typing import Any

import torch

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "d": 3,
    "n": 4,
    "rank": 1,  # None: P and Q without an axis for it
    "length": 13,
    "complex": True,
    "real_maps": False,  # real P, Q, B and C beside a complex A
    "discretization": "bilinear",
    "dt": 0.1,
    "decay": 1.0,  # scale of the real part of A
    "frequency": 3.0,  # scale of its imaginary part
    "coupling": 1.0,  # scale of P and Q
}

ROWS = (
    {"length": 0},
    {"length": 1},
    {"length": 2},
    {"length": 3},
    {"length": 16},
    {"length": 17},
    {"length": 64},
    {"length": 127},
    {"length": 300, "d": 2},
    {"length": 300, "d": 2, "dt": 0.02},  # alive at its end
    {"n": 1},
    {"n": 17},
    {"n": 33, "d": 1, "length": 65},
    {"d": 1},
    {"d": 17, "n": 2},
    {"rank": None},
    {"rank": 2},
    {"rank": 3, "n": 9, "length": 65},
    {"complex": False},
    {"complex": False, "rank": 2, "length": 65},
    {"complex": False, "n": 17, "length": 127},
    {"real_maps": True},
    {"dt": 1e-3},
    {"dt": 3.0},
    {"decay": 1e-2},
    {"decay": 100.0},
    {"frequency": 100.0},
    {"coupling": 10.0},
    {"coupling": 0.0},
    {"discretization": "zoh"},
    {"discretization": "zoh", "length": 1},
    {"discretization": "zoh", "length": 65, "rank": 2},
    {"discretization": "zoh", "complex": False},
    {"discretization": "zoh", "real_maps": True},
    {"discretization": "zoh", "decay": 0.0, "frequency": 0.0, "coupling": 0.0},  # no inverse: B̄ is ΔB
    {"discretization": "zoh", "dt": 3.0},
    {"layout": "strided"},
    {"layout": "strided", "complex": False},
    {"layout": "strided", "discretization": "zoh"},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    """A system that stays bounded: diag(A) decays, P P* takes energy out, and Q is P but for a tenth of the decay."""
    d, n = case["d"], case["n"]
    rank = () if case["rank"] is None else (case["rank"],)
    maps = draw.complex_normal if case["complex"] and not case["real_maps"] else draw.normal
    A = -draw.uniform(0.5, 1.0, d, n) * case["decay"]
    each = (n * (case["rank"] or 1)) ** -0.5  # so that the norm of P P* depends on neither
    P = maps(d, *rank, n) * case["coupling"] * each
    apart = maps(d, *rank, n) * case["decay"] * 0.1 * each
    return {
        "A": torch.complex(A, draw.normal(d, n, scale=case["frequency"])) if case["complex"] else A,
        "P": P,
        "Q": P + apart / max(case["coupling"], 1.0),
        "B": maps(d, n),
        "C": maps(d, n),
        "dt": draw.uniform(0.5, 1.0, d) * case["dt"],
        "length": case["length"],
        "discretization": case["discretization"],
    }


def flops(case: Case) -> float:
    """The recurrence by its structure: a rotation, r inner products, r sums and an output for each tap and state.

    Counting a product and a sum as two: with complex numbers a rotation is 6, and each of the others 4, as only real
    parts are kept or real numbers multiply.
    """
    rank = case["rank"] or 1
    each = 6.0 + 8.0 * rank + 4.0 if case["complex"] else 1.0 + 4.0 * rank + 2.0
    return each * case["d"] * case["n"] * case["length"]


SPECS = (
    Spec(
        "dplr_kernel",
        BASE,
        ROWS,
        make,
        flops,
        exact=("cpu",),  # PyTorch's FFT follows the Triton kernels
        bench={"d": 256, "n": 32, "length": 16384, "dt": 0.01, "frequency": 30.0},
    ),
)
