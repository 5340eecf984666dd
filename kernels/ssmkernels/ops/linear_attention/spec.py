"""Cases, inputs and cost of linear attention and its step."""

from __future__ import annotations

import math
from typing import Any

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

SIZES = {"b": 2, "l": 13, "h": 4, "g": 2, "k": 5, "v": 3}

BASE = {
    **SIZES,
    "decay": "key",  # what has one: each key channel, each "token" of a head, each "head"; "" for none
    "rate": 1.0,  # scale of the decays' logarithms
    "off": 0.0,  # which part of the decays is -∞
    "bonus": False,
    "scale": None,
    "state": True,
    "packed": False,
    "weights": "float32",  # of decays and bonus beside half precision; or "same"
    "values": 1.0,  # scale of v
}

ROWS = (
    {"decay": "", "state": False},
    {"decay": "head"},
    {"decay": "token"},
    {"decay": "token", "state": False, "g": 4},
    {"bonus": True},
    {"bonus": True, "decay": "head", "l": 1},
    {"bonus": True, "decay": "token", "g": 4},
    {"bonus": True, "decay": "", "g": 1},
    {"l": 0},
    {"l": 1},
    {"l": 17},
    {"l": 63, "b": 1, "h": 2, "g": 1},
    {"l": 64, "b": 1, "h": 2, "g": 1, "decay": "token"},
    {"l": 65, "b": 1, "h": 2, "g": 1, "bonus": True},
    {"l": 140, "b": 1, "h": 1, "g": 1},
    {"h": 1, "g": 1},
    {"h": 3, "g": 3},
    {"h": 6, "g": 1},
    {"k": 1, "v": 1},
    {"k": 16, "v": 16},
    {"k": 33, "v": 7, "h": 2},
    {"k": 7, "v": 33, "h": 2, "decay": "token"},
    {"k": 64, "v": 128, "b": 1, "h": 2, "g": 1},
    {"k": 256, "v": 40, "b": 1, "h": 1, "g": 1, "l": 3},
    {"k": 20, "v": 256, "b": 1, "h": 1, "g": 1, "l": 3},
    {"v": 9},
    {"scale": 1.0},
    {"state": False},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 90, "h": 2, "g": 1, "state": False, "decay": "token"},
    {"b": 1, "packed": True, "l": 21, "bonus": True, "decay": "head"},
    {"weights": "same"},
    {"rate": 1e-3},
    {"rate": 100.0},
    {"rate": 100.0, "decay": "token", "l": 70, "b": 1, "h": 1, "g": 1, "state": False},
    {"off": 0.3},
    {"off": 0.3, "decay": "token", "bonus": True},
    {"values": 1e3},
    {"layout": "strided"},
    {"layout": "strided", "decay": "token"},
    {"layout": "far", "b": 1, "l": 3, "h": 2, "g": 1},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, g, k, v = (case[key] for key in "blhgkv")
    shape = {"": None, "head": (h,), "token": (b, l, h), "key": (b, l, h, k)}[case["decay"]]
    log_decay = None
    if shape is not None:
        log_decay = -draw.uniform(0.0, 1.0, *shape) * case["rate"]
        if case["off"]:
            log_decay[draw.uniform(0.0, 1.0, *shape) < case["off"]] = -math.inf
    return {
        "q": draw.normal(b, l, g, k),
        "k": draw.normal(b, l, g, k),
        "v": draw.normal(b, l, h, v, scale=case["values"]),
        "log_decay": log_decay,
        "bonus": draw.normal(h, k) if case["bonus"] else None,
        "scale": case["scale"],
        **draw.carried(case, initial_state=(h, k, v)),
    }


def flops(case: Case) -> float:
    """Five for each number of the state and token: the decay, the outer product's multiply-add, the output's."""
    return 5.0 * case["b"] * case["l"] * case["h"] * case["k"] * case["v"]


WHOLE = Spec("linear_attention", BASE, ROWS, make, flops, bench={"b": 1, "l": 2048, "h": 4, "g": 4, "k": 96, "v": 192})
SPECS = (WHOLE, step_of(WHOLE))
