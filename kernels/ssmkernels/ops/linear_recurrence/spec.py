"""Cases, inputs and cost of the linear recurrence and its step."""

from __future__ import annotations

from typing import Any

import torch

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

BASE = {
    "b": 2,
    "l": 13,
    "d": 6,
    "complex": False,
    "decay": "real",  # of a, "complex" only where b is
    "fixed": False,  # whether a is the same at all times
    "size": 1.0,  # |a| is at most this
    "resets": False,  # a is 0 now and then, and 1
    "log": False,
    "state": True,
    "packed": False,
    "weights": "same",  # or "float32" beside half precision
}

ROWS = (
    {"state": False},
    {"fixed": True},
    {"fixed": True, "state": False, "l": 65},
    {"log": True},
    {"log": True, "fixed": True},
    {"log": True, "resets": True},
    {"resets": True},
    {"size": 1.2},
    {"complex": True},
    {"complex": True, "decay": "complex"},
    {"complex": True, "decay": "complex", "fixed": True},
    {"complex": True, "decay": "complex", "log": True, "d": 33},
    {"complex": True, "decay": "complex", "log": True, "fixed": True, "state": False},
    {"complex": True, "decay": "complex", "b": 1, "packed": True, "l": 21},
    {"complex": True, "fixed": True, "layout": "strided"},
    {"l": 0},
    {"l": 1},
    {"l": 64},
    {"l": 200, "b": 1, "d": 3},
    {"d": 1},
    {"d": 16},
    {"d": 33},
    {"d": 300, "l": 5},
    {"b": 1},
    {"b": 5},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 21, "state": False, "fixed": True, "d": 17},
    {"b": 1, "packed": True, "l": 21, "log": True, "resets": True},
    {"weights": "float32"},
    {"weights": "float32", "fixed": True},
    {"weights": "float32", "log": True},
    {"layout": "strided"},
    {"layout": "strided", "fixed": True},
    {"layout": "strided", "b": 1, "packed": True, "l": 21},
    {"layout": "far", "b": 1, "l": 7, "d": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, d = (case[key] for key in "bld")
    shape = (d,) if case["fixed"] else (b, l, d)
    a = draw.uniform(0.0, 1.0, *shape) * case["size"]
    if case["resets"]:
        kind = draw.uniform(0.0, 1.0, *shape)
        a = torch.where(kind < 0.2, 0.0, torch.where(kind < 0.4, 1.0, a))
    angle = draw.normal(*shape, scale=2.0) if case["decay"] == "complex" else None
    if case["log"]:
        a = torch.log(a) if angle is None else torch.complex(torch.log(a), angle)
    elif angle is not None:
        a = torch.polar(a, angle)
    number = draw.complex_normal if case["complex"] else draw.normal
    return {
        "a": a,
        "b": number(b, l, d),
        "log_a": case["log"],
        **draw.carried(case, number, initial_state=(d,)),
    }


def wide(case: Case, state: str = "initial_state") -> list[str]:
    """States, and decays that are float32 beside half precision, or real beside complex inputs."""
    return [state, *(["a"] if case["weights"] == "float32" or case["complex"] else [])]


def flops(case: Case) -> float:
    """A multiplication and an addition; four of each for complex numbers."""
    return (8.0 if case["complex"] else 2.0) * case["b"] * case["l"] * case["d"]


WHOLE = Spec(
    "linear_recurrence", BASE, ROWS, make, flops, bench={"b": 1, "l": 4096, "d": 1536, "state": False}, wide=wide
)
SPECS = (WHOLE, step_of(WHOLE))
