"""Attention's token among the native calls of a model that decodes: into the cache, and over what is there.

Where the cache lies, and how far it is filled, is another matter at each token, so that these arguments are renewed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import REAL, precision
from ssmkernels.native.calls import Calls, NotPreparedError
from ssmkernels.native.prepared import Prepared
from ssmkernels.native.rotary import placing, turns
from ssmkernels.ops.decode_attention.cpu import steps


class Place(NamedTuple):
    """Where the next token of each of s sequences goes in a cache, and what it sees there.

    Attributes:
        keys, values: ``(s, m, h_kv, k)`` and ``(s, m, h_kv, v)``, or in pages ``(pages, page_size, h_kv, …)``; heads'
            channels side by side.
        table: of pages, int32 ``(s, blocks)``; None where there are none.
        positions: int32 ``(s)``, tokens of each sequence before this one.
        before: int32 ``(s)``, those of them that the cache holds.
        after: int32 ``(s)``, one more each.
        longest: the largest of ``after``.
    """

    keys: Tensor
    values: Tensor
    table: Tensor | None
    positions: Tensor
    before: Tensor
    after: Tensor
    longest: int


class TakesTokens(Protocol):
    """A cache."""

    def take_token(self, dtype: torch.dtype) -> Place:
        """Counts one token more of each sequence, for whose keys and values of this dtype there is room then."""

    def trim(self) -> None:
        """Drops what no token to come will see."""


class Attended:
    """The arguments of attention's calls that are others at each token (:class:`ssmkernels.native.calls.Renewed`).

    Args:
        first: number of the first of the calls: queries, keys, values, attention.
        q: ``(b, h, k)``.
        v_size: channels of a head's values.
        left: tokens that one sees before its own; -1 for all.
    """

    def __init__(self, first: int, q: Tensor, v_size: int, left: int):
        self.dtype, self.left = q.dtype, left
        self.work = q.shape[0] * q.shape[1] * (q.shape[2] + v_size)  # multiply-adds for each key
        axes = ("page", "position", "head")
        placed = ["positions", "places", "y", "table", "page_size", *(f"y_{axis}" for axis in axes)]
        placed += ["table_row", "table_block"]
        seen = ["k", "v", "lengths", "block_table", "page_size", "threads", "table_sequence", "table_block"]
        seen += [f"{x}_{axis}" for x in "kv" for axis in axes]
        self.fields: Sequence[tuple[int, str]] = (
            (first, "positions"),
            *((first + i, name) for i in (1, 2) for name in placed),
            *((first + 3, name) for name in seen),
        )
        self.kept: Place | None = None

    def before(self, state: TakesTokens) -> Sequence[int]:
        place = self.kept = state.take_token(self.dtype)
        keys, values, table = place.keys, place.values, place.table
        positions, before = place.positions.data_ptr(), place.before.data_ptr()
        k, v, page_size = keys.data_ptr(), values.data_ptr(), keys.shape[1]
        of_table = (0, 0, 0) if table is None else (table.data_ptr(), *table.stride())
        of_k, of_v = keys.stride()[:3], values.stride()[:3]
        seen = place.longest if self.left < 0 else min(place.longest, self.left + 1)
        return (
            positions,
            *(positions, before, k, of_table[0], page_size, *of_k, *of_table[1:]),
            *(positions, before, v, of_table[0], page_size, *of_v, *of_table[1:]),
            *(k, v, place.after.data_ptr(), of_table[0], page_size, native.threads(seen * self.work)),
            *(*of_table[1:], *of_k, *of_v),
        )

    def after(self, state: TakesTokens) -> None:
        self.kept = None
        state.trim()


def attend(
    calls: Calls,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frequency: Tensor | None,
    left: int,
    scale: float,
    softcap: float,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Adds the calls for one token of each of b sequences: q ``(b, h, k)``, k ``(b, h_kv, k)``, v ``(b, h_kv, v)``.

    They turn queries and keys, put keys and values into the cache, and give what :func:`ssmkernels.decode_attention`
    does: ``(b, h, v)``. The layer's state must be one that takes tokens (:class:`TakesTokens`).

    Args:
        calls: takes them.
        q, k, v: results of earlier calls, rows of contiguous numbers of one dtype.
        frequency: of the rotary embedding, ``(r)`` in the precision of sums, for 2 r leading channels; None for none.
        left: tokens that one sees before its own; -1 for all.
        scale, softcap: as the op's.
        slopes, sinks: ``(h)``, in the precision of sums, or None.

    Raises:
        NotPreparedError: other shapes or dtypes, tensors that are not contiguous, or what the op refuses.
    """
    wide, (b, h, k_size), (_, h_kv, v_size) = precision(q), q.shape, v.shape
    halves = [t for t in (frequency, slopes, sinks) if t is not None]
    if (
        q.dtype not in REAL
        or any(t.dtype != q.dtype or t.device.type != "cpu" or not t[0].is_contiguous() for t in (q, k, v))
        or any(t.dtype != wide or not t.is_contiguous() for t in halves)
        or v_size == 0
        or k.shape != (b, h_kv, k_size)
        or (h % h_kv if h_kv else h)
        or any(t.shape != (h,) for t in (slopes, sinks) if t is not None)
        or (frequency is not None and not turns(q, frequency))
        or not math.isfinite(scale)
        or softcap < 0
    ):
        raise NotPreparedError("attend")
    renewed = Attended(len(calls.made), q, v_size, left)
    turned = torch.empty(b, h, k_size, dtype=q.dtype)
    calls.add(Prepared("rotary", placing(q, frequency) | {"y": turned.data_ptr()}, (q, frequency), turned))
    calls.add(Prepared("rotary", placing(k, frequency) | {"y": 0}, (k, frequency), k))
    calls.add(Prepared("rotary", placing(v, None) | {"y": 0}, (v,), v))
    out = torch.empty(b, h, v_size, dtype=q.dtype)
    values = {
        "q": turned.data_ptr(),
        **dict.fromkeys(("k", "v", "lengths", "block_table", "lse", "splits", "page_size", "threads"), 0),
        "slopes": native.address(slopes),
        "sinks": native.address(sinks),
        "out": out.data_ptr(),
        "dtype": native.DTYPES[q.dtype],
        "sequences": b,
        "l": 1,
        "h": h,
        "h_kv": h_kv,
        "k_size": k_size,
        "v_size": v_size,
        "left": left,
        **steps("q", turned[:, None], "sequence", "position", "head"),
        "lengths_step": 1,
        **steps("table", None, "sequence", "block"),
        **steps("k", None, "page", "position", "head"),
        **steps("v", None, "page", "position", "head"),
        "k_step": 1,
        "v_step": 1,
        "scale": scale,
        "softcap": softcap,
    }
    calls.renewed.append(renewed)
    return calls.add(Prepared("decode_attention", values, (turned, slopes, sinks), out, output="out"))
