"""Cases, inputs and cost of the matrix memory and its step."""

from __future__ import annotations

from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

BASE = {
    "b": 2,
    "l": 13,
    "h": 3,
    "k": 5,
    "v": 7,
    "scale": None,
    "state": True,
    "packed": False,
    "weights": "float32",  # of the gates beside half precision; or "same"
    "i": (-2.0, 2.0),  # the input gate lies between them, before exp
    "f": (-1.0, 5.0),  # the forget gate likewise, before σ
    "far": 0.0,  # what every third gate is further away by, up and down in turn
}

ROWS = (
    {"l": 0},
    {"l": 1},
    {"l": 17},
    {"l": 2, "state": False},
    {"l": 48, "h": 2},
    {"l": 63, "h": 2},
    {"l": 64, "h": 2},
    {"l": 65, "h": 2},
    {"l": 300, "b": 1, "h": 1},
    {"h": 1},
    {"h": 9},
    {"k": 1},
    {"k": 16, "v": 16},
    {"k": 24, "v": 24, "l": 65, "b": 1, "h": 2},
    {"k": 33, "v": 17, "h": 2},
    {"k": 64, "v": 128, "b": 1, "h": 2},
    {"v": 1},
    {"v": 9},
    {"scale": 1.0},
    {"scale": -0.3},
    {"state": False},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 150, "h": 2, "state": False},
    {"weights": "same"},
    {"i": (-10.0, -10.0), "f": (3.0, 6.0)},  # as the published layers start
    {"i": (5.0, 15.0)},
    {"i": (-100.0, 100.0), "f": (-100.0, 100.0), "l": 70, "h": 2},
    {"i": (30.0, 30.5), "f": (-30.5, -30.0)},  # y is the newest value, and all that gates get cancels
    {"i": (-30.0, 30.0), "f": (-30.0, 30.0), "l": 30},
    {"far": 100.0, "l": 70, "h": 2},
    {"f": (-70.0, -50.0)},
    {"f": (60.0, 100.0)},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "l": 3, "h": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, k, v = (case[key] for key in "blhkv")
    i, f = draw.uniform(*case["i"], b, l, h), draw.uniform(*case["f"], b, l, h)
    i[:, 2::6] += case["far"]
    i[:, 5::6] -= case["far"]
    f[:, 1::6] += case["far"]
    f[:, 4::6] -= case["far"]
    return {
        "q": draw.normal(b, l, h, k),
        "k": draw.normal(b, l, h, k),
        "v": draw.normal(b, l, h, v),
        "i": i,
        "f": f,
        "scale": case["scale"],
        **draw.carried(case, initial_C=(h, k, v), initial_n=(h, k), initial_m=(h,)),
    }


def flops(case: Case) -> float:
    """Five for each number of the state and token: the decay, the outer product's multiply-add, the output's."""
    return 5.0 * case["b"] * case["l"] * case["h"] * case["k"] * (case["v"] + 1)


WHOLE = Spec("mlstm", BASE, ROWS, make, flops, bench={"b": 1, "l": 2048, "h": 4, "k": 128, "v": 256, "state": False})
SPECS = (WHOLE, step_of(WHOLE, without=("far",)))
