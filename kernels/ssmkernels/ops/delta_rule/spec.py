"""Cases, inputs and cost of the gated delta rule and its step."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.check.steps import step_of

SIZES = {"b": 2, "l": 13, "h": 4, "g": 2, "k": 5, "v": 3}

BASE = {
    **SIZES,
    "decay": "h",  # one a head, "k": one a key channel, "": none
    "strength": 1.0,  # scale of the log decay
    "wall": False,  # log decays of 0, -100 and -inf among the others
    "beta": None,  # a number for all; between 0 and 1 if None
    "norm": 1.0,  # of the keys
    "repeated": False,  # the same key at every token
    "scale": None,
    "state": True,
    "packed": False,
    "weights": "float32",  # of beta and the log decay beside half precision; or "same"
}

ROWS = (
    {"decay": "", "state": False},
    {"decay": "k"},
    {"l": 0},
    {"l": 1},
    {"l": 20},
    {"l": 2, "decay": "k"},
    {"l": 63, "b": 1, "h": 2, "g": 1},
    {"l": 64, "b": 1, "h": 2, "g": 1, "decay": "k"},
    {"l": 65, "b": 1, "h": 1, "g": 1, "decay": "k"},
    {"l": 65, "b": 1, "h": 1, "g": 1, "decay": ""},
    {"l": 300, "b": 1, "h": 1, "g": 1},
    {"h": 1, "g": 1},
    {"h": 11, "g": 1, "l": 3},
    {"h": 6, "g": 3},
    {"g": 4, "decay": "k"},
    {"k": 1, "v": 1},
    {"k": 1, "decay": "k"},
    {"k": 16, "v": 16},
    {"k": 17, "v": 33, "decay": "k"},
    {"v": 7},
    {"k": 33, "v": 7},
    {"k": 128, "v": 256, "b": 1, "l": 20, "h": 1, "g": 1},
    {"k": 256, "v": 64, "b": 1, "l": 17, "h": 1, "g": 1, "decay": "k"},
    {"wall": True},
    {"wall": True, "decay": "k", "l": 70, "b": 1, "h": 2, "g": 1},
    {"strength": 1e-3},
    {"strength": 30.0, "decay": "k"},
    {"beta": 0.0},
    {"beta": 1.0, "l": 40, "b": 1},
    {"beta": 2.0, "l": 40, "b": 1, "decay": "k"},
    {"norm": 0.0},
    {"norm": 30.0, "l": 5},
    {"norm": 30.0, "l": 5, "decay": "k"},
    {"repeated": True, "l": 66, "b": 1, "h": 2, "g": 1},
    {"repeated": True, "l": 66, "b": 1, "h": 2, "g": 1, "beta": 2.0, "decay": ""},
    {"scale": 0.3},
    {"state": False},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 90, "h": 2, "g": 1, "state": False, "decay": "k"},
    {"b": 1, "packed": True, "l": 21, "decay": ""},
    {"weights": "same"},
    {"weights": "same", "decay": "k"},
    {"layout": "strided", "decay": "k"},
    {"layout": "far", "b": 1, "l": 3, "h": 2},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, g, k, v = (case[key] for key in "blhgkv")
    keys = draw.normal(b, 1 if case["repeated"] else l, g, k).expand(b, l, g, k)
    log_decay = None
    # Where nothing is written, a state may not decay to subnormal numbers, which native kernels take for 0
    writes = case["beta"] != 0 and case["norm"] > 0
    strength = case["strength"] if writes else 1 / max(l, 1)
    if case["decay"]:
        log_decay = -draw.uniform(0.0, 1.0, b, l, h, *([k] if case["decay"] == "k" else [])) * strength
        if case["wall"] and writes:
            for first, value in ((2, 0.0), (3, -100.0), (7, float("-inf"))):
                log_decay[:, first::11] = value
    beta = draw.uniform(0.0, 1.0, b, l, h)
    return {
        "q": F.normalize(draw.normal(b, l, g, k), dim=-1),
        "k": F.normalize(keys, dim=-1) * case["norm"],
        "v": draw.normal(b, l, h, v),
        "beta": beta if case["beta"] is None else beta.new_full(beta.shape, case["beta"]),
        "log_decay": log_decay,
        "scale": case["scale"],
        **draw.carried(case, initial_state=(h, k, v)),
    }


def flops(case: Case) -> float:
    """Seven for each number of the state and token: the decay, and three multiply-adds with k, k again, and q."""
    return 7.0 * case["b"] * case["l"] * case["h"] * case["k"] * case["v"]


WHOLE = Spec("delta_rule", BASE, ROWS, make, flops, bench={"b": 1, "l": 2048, "h": 6, "g": 6, "k": 128, "v": 256})
SPECS = (WHOLE, step_of(WHOLE, without=("repeated", "wall")))
