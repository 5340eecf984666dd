"""Cases, inputs and cost of attention to selected blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "b": 2,
    "l": 13,
    "m": None,  # keys; None for l
    "h": 4,
    "h_kv": 2,
    "g": 2,  # heads that select
    "n": 2,
    "k": 8,
    "v": None,  # head dim of the values; None for k
    "block_size": 4,
    "own": True,  # whether the block of the query itself is one of them
    "scale": None,
    "lse": False,
    "x": 1.0,  # scale of the logits
}

ROWS = (
    {"l": 0},
    {"l": 0, "m": 7},
    {"l": 1},
    {"l": 1, "m": 65, "n": 5},
    {"l": 3, "m": 40, "own": False, "lse": True},
    {"l": 8, "m": 5, "lse": True},  # the first queries see nothing
    {"l": 12, "m": 5, "lse": True},
    {"l": 65, "b": 1, "block_size": 16, "n": 3},
    {"m": 29},
    {"m": 0, "own": False, "lse": True},
    {"n": 0, "own": False, "lse": True},
    {"n": 6, "own": False},  # more than there are: some are named twice
    {"own": False, "lse": True},
    {"g": 4},
    {"h_kv": 1},
    {"h_kv": 1, "g": 1},
    {"h": 1, "h_kv": 1, "g": 1},
    {"h": 6, "h_kv": 1, "g": 3},
    {"b": 0},
    {"k": 1},
    {"k": 33, "v": 5},
    {"block_size": 1, "n": 5},
    {"block_size": 64},
    {"scale": -0.3},
    {"scale": 0.0},
    {"lse": True},
    {"x": 30.0},
    {"x": 1e3},
    {"layout": "strided"},
    {"layout": "strided", "l": 3, "lse": True},
    {"layout": "far", "b": 1, "l": 3, "h": 2, "h_kv": 1, "g": 1, "k": 4},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, h_kv, k = (case[key] for key in ("b", "l", "h", "h_kv", "k"))
    m = l if case["m"] is None else case["m"]
    return {
        "q": draw.normal(b, l, h, k, scale=case["x"]),
        "k": draw.normal(b, m, h_kv, k),
        "v": draw.normal(b, m, h_kv, k if case["v"] is None else case["v"]),
        "blocks": blocks(case, l, m, draw),
        "block_size": case["block_size"],
        "scale": case["scale"],
        "return_lse": case["lse"],
    }


def blocks(case: Case, l: int, m: int, draw: Draw) -> Tensor:
    """Random ones, some of which are none, later than the query, or named twice."""
    count = -(-m // case["block_size"])
    shape = case["b"], l, case["g"], case["n"]
    found = draw.uniform(-1, count, *shape).floor().int()
    if case["own"] and case["n"]:
        own = torch.arange(m - l, m) // case["block_size"]
        found[..., -1] = own.clamp(min=-1)[:, None]
    return found


def flops(case: Case) -> float:
    """Two matrix products over whole blocks, as if none were named twice or lay after the query."""
    m = case["l"] if case["m"] is None else case["m"]
    keys = min(case["n"] * case["block_size"], m)
    dims = case["k"] + (case["k"] if case["v"] is None else case["v"])
    return 2.0 * case["b"] * case["l"] * case["h"] * keys * dims


BENCH = {"b": 1, "l": 4096, "h": 16, "h_kv": 1, "g": 1, "n": 8, "k": 64, "block_size": 64}
SPECS = (Spec("selected_attention", BASE, ROWS, make, flops, BENCH),)
