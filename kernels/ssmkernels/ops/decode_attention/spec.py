"""Cases, inputs and cost of attention over a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.check.spec import Case, Draw, Spec

BASE = {
    "s": 3,
    "l": 1,
    "m": 17,
    "h": 4,
    "h_kv": 2,
    "k": 8,
    "v": None,  # head dim of the values; None for k
    "lengths": "mixed",  # of all lengths from m to 0; or "full", or "empty"
    "page_size": None,
    "window": None,
    "scale": None,
    "softcap": 0.0,
    "alibi": False,
    "sinks": False,
    "num_splits": None,
    "lse": False,
    "weights": "same",  # dtype of slopes and sinks; or "float32" beside half precision
    "x": 1.0,  # scale of the logits
}

ROWS = (
    {"lengths": "full"},
    {"lengths": "empty"},
    {"lengths": "empty", "sinks": True, "lse": True},
    {"l": 0},
    {"l": 4},
    {"l": 4, "lengths": "full"},
    {"s": 0},
    {"s": 1},
    {"s": 7},
    {"m": 0},
    {"m": 1},
    {"m": 63},
    {"m": 64},
    {"m": 65},
    {"m": 300, "lengths": "full"},
    {"m": 300, "page_size": 16},
    {"m": 1300, "s": 2, "l": 2, "lse": True, "sinks": True},
    {"m": 1300, "s": 2, "page_size": 3, "window": (700, 0), "lse": True},
    {"m": 601, "num_splits": 4, "page_size": 16, "alibi": True},
    {"m": 90, "h": 16, "h_kv": 2, "k": 64, "l": 3, "v": 24},
    {"m": 90, "h": 15, "h_kv": 3, "k": 40, "v": 65, "l": 2},
    {"m": 40, "h": 9, "h_kv": 9, "k": 256},
    {"h_kv": 1},
    {"h_kv": 4},
    {"h": 1, "h_kv": 1},
    {"h": 6, "h_kv": 2},
    {"k": 1},
    {"k": 33},
    {"k": 64},
    {"v": 5},
    {"page_size": 1},
    {"page_size": 3, "m": 35},
    {"page_size": 4},
    {"page_size": 16},
    {"page_size": 4, "l": 3, "window": (5, 0)},
    {"page_size": 4, "lengths": "empty"},
    {"page_size": 16, "m": 77, "window": (20, 0), "sinks": True},
    {"window": (5, 0)},
    {"window": (0, 0), "lengths": "full"},
    {"window": (5, 0), "l": 3, "lengths": "full"},
    {"scale": 0.3},
    {"scale": -0.3},
    {"scale": 0.0},
    {"softcap": 5.0},
    {"alibi": True},
    {"sinks": True},
    {"num_splits": 1},
    {"num_splits": 3, "m": 65},
    {"num_splits": 40, "m": 90, "l": 2, "lse": True},
    {"l": 9, "h": 8, "h_kv": 1, "window": (7, 0)},
    {"lse": True},
    {"lse": True, "page_size": 4, "softcap": 5.0, "alibi": True, "sinks": True, "window": (9, 0), "l": 2},
    {"alibi": True, "weights": "float32"},
    {"sinks": True, "weights": "float32"},
    {"x": 30.0},
    {"x": 1e3},
    {"layout": "strided"},
    {"layout": "strided", "page_size": 4, "lse": True},
    {"layout": "strided", "m": 70, "k": 17, "v": 6, "l": 2},
    {"layout": "far", "m": 3, "h": 2, "h_kv": 1, "k": 4},
    {"layout": "far", "m": 5, "h": 2, "h_kv": 1, "k": 4, "page_size": 4, "s": 1, "lengths": "full"},
)


def make(case: Case, draw: Draw) -> dict[str, Any]:
    s, l, m, h, h_kv, k = (case[key] for key in ("s", "l", "m", "h", "h_kv", "k"))
    lengths = lengths_of(case)
    unwritten = torch.arange(m) >= lengths[:, None]  # (s m)
    caches, block_table = [], None
    for size in (k, k if case["v"] is None else case["v"]):
        cache = draw.normal(s, m, h_kv, size).masked_fill(unwritten[..., None, None], torch.nan)
        if case["page_size"] is not None:
            cache, block_table = pages(cache, lengths, case["page_size"])
        caches.append(cache)
    return {
        "q": draw.normal(s, l, h, k, scale=case["x"]),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "lengths": lengths,
        "block_table": block_table,
        "window": case["window"],
        "scale": case["scale"],
        "softcap": case["softcap"],
        "alibi_slopes": draw.uniform(0.05, 0.5, h) if case["alibi"] else None,
        "sinks": draw.normal(h) if case["sinks"] else None,
        "num_splits": case["num_splits"],
        "return_lse": case["lse"],
    }


def lengths_of(case: Case) -> Tensor:
    s, m = case["s"], case["m"]
    mixed = [m - i * m // max(s - 1, 1) for i in range(s)]
    return torch.tensor({"mixed": mixed, "full": [m] * s, "empty": [0] * s}[case["lengths"]], dtype=torch.int32)


def pages(cache: Tensor, lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A cache (s m h k) in pages, from the last to the first and one unused, and the table that finds them.

    Entries of the table past a sequence's last page name none; the unused page, and what is unwritten, hold NaN.
    """
    s, m = cache.shape[:2]
    blocks = -(-m // size)
    found = cache.new_full((s * blocks + 1, size, *cache.shape[2:]), torch.nan)
    table = torch.full((s, blocks), 2**30, dtype=torch.int32)
    for i, length in enumerate(lengths.tolist()):
        for j in range(-(-length // size)):
            page = s * blocks - (i * blocks + j)
            part = cache[i, j * size : (j + 1) * size]
            found[page, : len(part)] = part
            table[i, j] = page
    return found, table


def flops(case: Case) -> float:
    """Two matrix products over each sequence's tokens; a window is not taken off."""
    dims = case["k"] + (case["k"] if case["v"] is None else case["v"])
    return 2.0 * case["l"] * case["h"] * float(lengths_of(case).sum()) * dims


BENCH = {"s": 1, "m": 32768, "h": 32, "h_kv": 4, "k": 128, "lengths": "full"}
SPECS = (Spec("decode_attention", BASE, ROWS, make, flops, BENCH),)
