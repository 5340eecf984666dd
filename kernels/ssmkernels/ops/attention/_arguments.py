"""Checks that attention over whole sequences and over caches share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.block_mask import BlockMask
from ssmkernels.core.plain import readable
from ssmkernels.core.validate import NO_BOUND, check_dtypes, window_bound

UNBOUNDED = 2**31 - 1  # a window's bound from which it is none: no sequence reaches as far


def bounds(op: str, causal: bool, window: Any) -> tuple[int, int]:
    """``causal`` and ``window`` as one pair: keys seen left and right of a query, -1 for no bound.

    A bound that is longer than any sequence becomes -1, so that no implementation adds positions to a number that its
    integers cannot hold.

    Raises:
        TypeError: ``window`` is no pair of ints.
        ValueError: a bound below -1.
    """
    if window is None:
        window = (-1, -1)
    if not isinstance(window, tuple | list) or len(window) != 2 or not all(_is_int(w) for w in window):
        raise TypeError(f"{op}: `window` must be None or two ints (left, right), -1 for no bound; got {window!r}")
    left, right = (-1 if w >= UNBOUNDED else w for w in window)
    if left < -1 or right < -1:
        raise ValueError(f"{op}: the bounds of `window` must be at least 0, or -1 for none; got {window!r}")
    return window_bound(left), 0 if causal else window_bound(right)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_logits(op: str, sizes: Mapping[str, int], softcap: float) -> None:
    """Checks the heads and what bounds the logits.

    Raises:
        ValueError: h_kv does not divide h, no head dim, or a negative ``softcap``.
    """
    h, h_kv = sizes["h"], sizes["h_kv"]
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"{op}: the {h_kv} heads of keys and values must divide the {h} heads of `q`")
    if sizes["k"] == 0:
        raise ValueError(f"{op}: `q` must have a head dim of at least 1; got 0")
    if softcap < 0:
        raise ValueError(f"{op}: `softcap` must be positive, or 0 for none; got {softcap!r}")


def check_positions(op: str, q_positions: Any, k_positions: Any) -> None:
    """Checks that queries and keys both have positions of their own, in integers, or neither.

    Raises:
        ValueError: one is given without the other.
        TypeError: they are not int32 or int64.
    """
    given = {"q_positions": q_positions, "k_positions": k_positions}
    check_dtypes(op, given, (torch.int32, torch.int64))
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1:
        (present,) = given.keys() - missing
        raise ValueError(f"{op}: `{present}` needs `{missing[0]}`, positions of the other side; got None")


def placed(op: str, name: str, positions: Tensor | None) -> Tensor | None:
    """Positions in int32, so small that kernels can subtract them and add a window's bound.

    Raises:
        ValueError: one is too large, where they can be read at no cost.
    """
    if positions is None:
        return None
    if positions.numel() and readable(positions):
        low, high = (int(x) for x in positions.aminmax())
        if low < -NO_BOUND or high >= NO_BOUND:
            raise ValueError(
                f"{op}: `{name}` must be from {-NO_BOUND} to {NO_BOUND - 1}; got {low if low < -NO_BOUND else high}"
            )
    return positions.int()


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scale of the products of queries and keys: 1/√k where none is given."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def check_block_mask(op: str, block_mask: Any, sizes: Mapping[str, int], device: torch.device) -> None:
    """Checks that a mask, if there is one, fits queries, keys and heads.

    Raises:
        TypeError: it is no BlockMask.
        ValueError: it is for other lengths or heads, or lies on another device.
    """
    if block_mask is None:
        return
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"{op}: `block_mask` must be a BlockMask, which ssmkernels.masks makes; got {type(block_mask).__name__}"
        )
    if (block_mask.q_len, block_mask.k_len) != (sizes["l"], sizes["m"]):
        raise ValueError(
            f"{op}: `block_mask` must be for {sizes['l']} queries and {sizes['m']} keys; "
            f"got one for {block_mask.q_len} and {block_mask.k_len}"
        )
    if block_mask.heads not in (1, sizes["h"]):
        raise ValueError(f"{op}: `block_mask` must have 1 head, or {sizes['h']} as `q`; got {block_mask.heads}")
    if block_mask.device != device:
        raise ValueError(f"{op}: `block_mask` must be on {device}, where `q` is; got {block_mask.device}")
