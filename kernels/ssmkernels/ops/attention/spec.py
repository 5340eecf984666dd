"""Cases, inputs and cost of attention."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ssmkernels.check.spec import Case, Draw, Spec
from ssmkernels.masks import BlockMask, from_function, random_blocks
from ssmkernels.ops.attention import attention
from ssmkernels.ops.attention._arguments import bounds
from ssmkernels.ops.attention.reference import distances, in_window

# As many keys m as queries l where it is None, and values as wide as keys where v is
SIZES = {"b": 2, "l": 13, "m": None, "h": 4, "h_kv": 2, "k": 8, "v": None}

BASE = {
    **SIZES,
    "causal": True,
    "window": None,
    "scale": None,
    "softcap": 0.0,
    "alibi": False,
    "sinks": False,
    "mask": None,  # "shared" by all heads, or one for each of the "heads"; or an "eighth" of the blocks of keys
    "lse": False,
    "packed": False,
    "packed_k": False,  # borders of their own for keys and values
    "positions": None,  # of the tokens' own: "shuffled", "sorted", or "far", where keys are beyond some queries
    "weights": "same",  # dtype of slopes and sinks; or "float32" beside half precision
    "x": 1.0,  # scale of the logits
}

LONG = {"b": 1, "h": 2, "h_kv": 1}

ROWS = (
    {"causal": False},
    {"l": 0},
    {"l": 0, "m": 7},
    {"l": 1},
    {"l": 2},
    {"l": 63, **LONG},
    {"l": 64, **LONG},
    {"l": 65, **LONG},
    {"l": 65, "causal": False, **LONG},
    {"l": 150, **LONG},
    {"m": 29},
    {"m": 29, "causal": False},
    {"m": 5},  # the first queries see nothing
    {"m": 5, "causal": False},
    {"m": 0},
    {"m": 1, "causal": False},
    {"l": 1, "m": 65},
    {"l": 3, "m": 65},
    {"h_kv": 1},
    {"h_kv": 4},
    {"h": 1, "h_kv": 1},
    {"h": 6, "h_kv": 2},
    {"b": 1},
    {"k": 1},
    {"k": 16},
    {"k": 33},
    {"k": 64, **LONG},
    {"v": 5},
    {"v": 24},
    {"window": (3, 0)},
    {"window": (0, 0)},
    {"window": (0, 0), "causal": False},
    {"window": (2, 4), "causal": False},
    {"window": (-1, 2), "causal": False},
    {"window": (4, -1), "causal": False},
    {"window": (3, 1), "causal": False, "m": 5},
    {"window": (10, 3), "causal": False, "l": 280, **LONG},
    {"window": (20, 0), "l": 260, "m": 270, **LONG},
    {"window": (20, 0), "l": 257, "alibi": True, **LONG},
    {"scale": 0.3},
    {"scale": -0.3, "causal": True},
    {"scale": 0.0, "causal": True},
    {"softcap": 5.0},
    {"softcap": 0.5, "causal": False, "lse": True},
    {"alibi": True},
    {"alibi": True, "m": 29, "causal": False},
    {"sinks": True},
    {"sinks": True, "m": 5, "lse": True},
    {"lse": True},
    {"lse": True, "m": 5},
    {"lse": True, "softcap": 5.0, "alibi": True, "sinks": True, "window": (4, 0)},
    {"alibi": True, "weights": "float32"},
    {"alibi": True, "sinks": True, "weights": "float32"},
    {"b": 1, "packed": True, "l": 21},
    {"b": 1, "packed": True, "l": 21, "causal": False, "lse": True},
    {"b": 1, "packed": True, "l": 21, "window": (3, 0), "alibi": True},
    {"b": 1, "packed": True, "packed_k": True, "l": 21, "m": 30},
    {"b": 1, "packed": True, "packed_k": True, "l": 21, "m": 30, "causal": False, "lse": True},
    {"mask": "shared", "l": 45, "causal": False},
    {"mask": "heads", "l": 45, "causal": False},
    {"mask": "shared", "l": 45, "m": 70, "lse": True},
    {"mask": "heads", "l": 70, "m": 45, "lse": True},
    {"mask": "heads", "l": 37, "window": (9, 5), "causal": False, "alibi": True, "sinks": True, "softcap": 5.0},
    {"mask": "heads", "l": 0, "m": 7},
    {"mask": "shared", "m": 0},
    {"mask": "heads", "l": 33, "layout": "strided"},
    {"positions": "shuffled"},
    {"positions": "shuffled", "causal": False},
    {"positions": "shuffled", "m": 0},
    {"positions": "sorted", "l": 65, "m": 90, **LONG},
    {"positions": "sorted", "l": 65, "window": (9, 0), "alibi": True, **LONG},
    {"positions": "far", "m": 29, "lse": True, "sinks": True},
    {"positions": "far", "lse": True},
    {"positions": "shuffled", "window": (5, 2), "causal": False, "softcap": 5.0, "alibi": True, "lse": True},
    {"positions": "shuffled", "b": 1, "packed": True, "l": 21},
    {"positions": "sorted", "b": 1, "packed": True, "packed_k": True, "l": 21, "m": 30, "alibi": True, "lse": True},
    {"positions": "shuffled", "mask": "heads", "l": 45, "m": 70, "alibi": True},
    {"positions": "sorted", "mask": "shared", "l": 45, "m": 70, "window": (20, 0)},
    {"x": 30.0},
    {"x": 1e3},
    {"x": 1e-3},
    {"layout": "strided"},
    {"layout": "strided", "window": (3, 0), "alibi": True, "lse": True},
    {"layout": "far", "b": 1, "l": 3, "h": 2, "h_kv": 1, "k": 4},
)


BLOCK = (8, 16)  # of masks


def block_mask(case: Case, l: int, m: int, draw: Draw) -> BlockMask | None:
    """Random blocks, of which some are visible as a whole, some in part, and some not at all."""
    if case["mask"] is None:
        return None
    if case["mask"] == "eighth":
        return random_blocks(l, m, count=max(1, m // (8 * 128)))
    heads = case["h"] if case["mask"] == "heads" else 1
    rows, columns = (-(-length // block) for length, block in zip((l, m), BLOCK, strict=True))
    kind = draw.uniform(0, 1, heads, rows, columns)
    pair = draw.uniform(0, 1, heads, max(1, l), max(1, m))

    def seen(h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return pair[h, i, j] < 3 * kind[h, i // BLOCK[0], j // BLOCK[1]] - 1

    return from_function(seen, l, m, heads=heads, block_size=BLOCK)


def positions(case: Case, l: int, m: int, draw: Draw) -> dict[str, Tensor | None]:
    """Positions with gaps, in the order that the case names; int64, and int32 where they are sorted."""
    kind = case["positions"]
    if kind is None:
        return {"q_positions": None, "k_positions": None}
    reach = 2 * max(l, m, 1)
    q, k = (draw.uniform(0, reach, case["b"], length).long() for length in (l, m))
    if kind == "sorted":
        q, k = q.sort().values.int(), k.sort().values.int()
    return {"q_positions": q, "k_positions": k + reach // 2 * (kind == "far")}


def make(case: Case, draw: Draw) -> dict[str, Any]:
    b, l, h, h_kv, k = (case[key] for key in ("b", "l", "h", "h_kv", "k"))
    m = l if case["m"] is None else case["m"]
    v = k if case["v"] is None else case["v"]
    return {
        "q": draw.normal(b, l, h, k, scale=case["x"]),
        "k": draw.normal(b, m, h_kv, k),
        "v": draw.normal(b, m, h_kv, v),
        "causal": case["causal"],
        "window": case["window"],
        "scale": case["scale"],
        "softcap": case["softcap"],
        "alibi_slopes": draw.uniform(0.05, 0.5, h) if case["alibi"] else None,
        "sinks": draw.normal(h) if case["sinks"] else None,
        "block_mask": block_mask(case, l, m, draw),
        "cu_seqlens": draw.borders(l) if case["packed"] else None,
        "cu_seqlens_k": torch.tensor([0, 0, 3, m // 2 - 1, m], dtype=torch.int32) if case["packed_k"] else None,
        **positions(case, l, m, draw),
        "return_lse": case["lse"],
    }


def flops(case: Case) -> float:
    """Two matrix products over the pairs of query and key that the mask leaves."""
    arguments = make(case, Draw(0))
    q, k, v = (arguments[name] for name in "qkv")
    left, right = case["window"] or (-1, -1)
    right = 0 if case["causal"] else right
    ends = [[0, q.shape[1]], [0, k.shape[1]]]
    if case["packed"]:
        borders = arguments["cu_seqlens"].tolist()
        ends = [borders, arguments["cu_seqlens_k"].tolist() if case["packed_k"] else borders]
    if arguments["block_mask"] is not None or case["positions"] is not None:
        return _masked_flops(arguments)
    pairs = 0
    for (start, end), (start_k, end_k) in zip(*(itertools.pairwise(e) for e in ends), strict=True):
        l, m = end - start, end_k - start_k
        for p in range(m - l, m):
            first = 0 if left < 0 else max(0, p - left)
            last = m - 1 if right < 0 else min(m - 1, p + right)
            pairs += max(0, last - first + 1)
    return 2.0 * case["b"] * case["h"] * pairs * (k.shape[-1] + v.shape[-1])


def _masked_flops(arguments: dict[str, Any]) -> float:
    """Two products for each pair that is seen; where sequences are packed, or have positions of their own, the number
    of pairs is a sum of exponentials."""
    if arguments["cu_seqlens"] is None and arguments["q_positions"] is None:
        mask, (b, l, h, k_dim), m = arguments["block_mask"], arguments["q"].shape, arguments["k"].shape[1]
        left, right = bounds("attention", arguments["causal"], arguments["window"])
        seen = mask.dense() & in_window(distances(l, m, mask.device), left, right)
        return 2.0 * b * (h // mask.heads) * int(seen.sum()) * (k_dim + arguments["v"].shape[3])
    q, k, v = (torch.zeros_like(arguments[name]) for name in "qkv")
    names = ("causal", "window", "block_mask", "cu_seqlens", "cu_seqlens_k", "q_positions", "k_positions")
    rest = {name: arguments[name] for name in names}
    _, lse = attention(q, k, v, **rest, return_lse=True, implementation="reference")
    return 2.0 * float(lse.exp().sum()) * (k.shape[-1] + v.shape[-1])


SPECS = (Spec("attention", BASE, ROWS, make, flops, bench={"b": 1, "l": 1024, "h": 12, "h_kv": 12, "k": 64}),)
