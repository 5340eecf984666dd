"""Cases, inputs and cost of the general delta rule and its step."""

from __future__ import annotations

from typing import Any

import torch

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

BASE = {
    "b": 2,
    "l": 7,
    "h": 3,
    "k": 5,
    "v": 6,
    "norm": 1.0,  # of a and b
    "erase": 1.0,  # a = -b times it: 1 erases what lies along b, up to 2 it reflects
    "decay": 1.0,  # scale of the log decays; None for no decay
    "resets": False,  # log decays of -∞, -100 and 0 now and then
    "scale": None,
    "state": True,
    "packed": False,
    "weights": "float32",  # of the log decays beside half precision; or "same"
}

ROWS = (
    {"state": False},
    {"decay": None},
    {"decay": None, "state": False, "l": 20},
    {"resets": True, "l": 33},
    {"resets": True, "l": 33, "b": 1, "h": 1, "k": 16, "v": 16},
    {"decay": 0.01},
    {"decay": 30.0},
    {"erase": 0.0},
    {"erase": 2.0},
    {"norm": 0.0},
    {"scale": 1.0},
    {"l": 0},
    {"l": 1},
    {"l": 16},
    {"l": 65, "b": 1, "h": 2},
    {"l": 140, "b": 1, "h": 1, "k": 3, "v": 2},
    {"k": 1, "v": 1},
    {"v": 9},
    {"k": 16, "v": 16},
    {"k": 16, "v": 33, "b": 1},
    {"k": 33, "v": 16, "b": 1},
    {"k": 64, "v": 64, "b": 1, "h": 1, "l": 40},
    {"k": 128, "v": 80, "b": 1, "h": 1, "l": 5},
    {"h": 1},
    {"h": 5, "b": 1},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 70, "h": 1, "state": False},
    {"weights": "same"},
    {"layout": "strided"},
    {"layout": "far", "b": 1, "l": 3, "h": 1},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, k, v = (case[key] for key in "blhkv")
    along = draw.normal(b, l, h, k)
    along = along / along.norm(dim=-1, keepdim=True) * case["norm"]
    log_decay = None if case["decay"] is None else -draw.uniform(0.0, 1.0, b, l, h, k) * case["decay"]
    if log_decay is not None and case["resets"]:
        kind = draw.uniform(0.0, 1.0, b, l, h, k)
        for value, below in ((-torch.inf, 0.1), (-100.0, 0.2), (0.0, 0.4)):
            log_decay = torch.where((kind < below) & (kind >= below / 2), value, log_decay)
    return {
        "q": draw.normal(b, l, h, k),
        "k": draw.normal(b, l, h, k) * k**-0.5,
        "v": draw.normal(b, l, h, v),
        "a": -along * case["erase"],
        "b": along,
        "log_decay": log_decay,
        "scale": case["scale"],
        **draw.carried(case, initial_state=(h, k, v)),
    }


def flops(case: Case) -> float:
    """A state's element is read, decays, takes in two products and is read again: nine operations."""
    return 9.0 * case["b"] * case["l"] * case["h"] * case["k"] * case["v"]


BENCH = {"b": 1, "l": 2048, "h": 12, "k": 64, "v": 64, "state": False, "scale": 1.0}
WHOLE = Spec("generalized_delta_rule", BASE, ROWS, make, flops, BENCH)
SPECS = (WHOLE, step_of(WHOLE, rows=({"resets": True},)))
