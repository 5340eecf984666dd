"""Attention in the native CPU library, in which each query sees one run of the keys (``cpu_runs.h``).

By positions, a query sees one run of the keys in their order. So tokens in any other order are sorted first, and the
results go back to where they came from.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.native import missing
from ssmkernels.ops.attention import native
from ssmkernels.ops.attention.native import SAVES, empty

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "unsupported"]


def unsupported(a: Any) -> str | None:
    options = {
        "softcap": a.softcap > 0,
        "ALiBi": a.alibi_slopes is not None,
        "sinks": a.sinks is not None,
        "block masks": a.block_offsets is not None,
        "packed sequences": a.cu_seqlens is not None,
    }
    for option, asked in options.items():
        if asked:
            return f"the native kernel has no {option}"
    return native.unsupported(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    a, queries, _ = _in_order(a)
    out, lse, exact, sums = native.forward("attention", a, save, a.k.shape[2], _keys(a), **_runs(a))
    return queries.back(out), queries.back(lse, 2), queries.back(exact), queries.back(sums, 2)


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    a, queries, keys = _in_order(a)
    if queries.places is not None:
        out, exact = queries.sorted(saved.out), queries.sorted(saved.exact)
        saved = SimpleNamespace(out=out, exact=exact, logsums=queries.sorted(saved.logsums, 2))
        lse = None if grads.lse is None else queries.sorted(grads.lse, 2)
        grads = SimpleNamespace(out=queries.sorted(grads.out), lse=lse, wanted=grads.wanted)
    found = native.backward("attention_backward", a, saved, grads, a.k.shape[2], _keys(a), **_runs(a))
    found = {name: (queries if name == "q" else keys).back(gradient) for name, gradient in found.items()}
    return {**found, "alibi_slopes": None, "sinks": None}


class _Order(NamedTuple):
    """The order of tokens by their positions: where each comes from, int64 ``(b, n)``; None where it is theirs."""

    places: Tensor | None

    @classmethod
    def of(cls, positions: Tensor) -> _Order:
        if (positions[:, 1:] >= positions[:, :-1]).all():
            return cls(None)
        return cls(positions.argsort(dim=1, stable=True))

    def sorted(self, x: Tensor, axis: int = 1) -> Tensor:
        """x, whose tokens lie on ``axis``, in this order; as it is if it is empty."""
        return x if self.places is None or not x.numel() else x.gather(axis, _over(self.places, x, axis))

    def back(self, x: Tensor, axis: int = 1) -> Tensor:
        """x in this order, as it was before; as it is if it is empty."""
        if self.places is None or not x.numel():
            return x
        return torch.empty_like(x).scatter_(axis, _over(self.places, x, axis), x)


def _over(places: Tensor, x: Tensor, axis: int) -> Tensor:
    shape = [places.shape[0], *[1] * (x.ndim - 1)]
    shape[axis] = places.shape[1]
    return places.view(shape).expand(x.shape)


def _in_order(a: Any) -> tuple[Any, _Order, _Order]:
    """The arguments with queries and keys by rising positions, and the orders of both."""
    if a.q_positions is None:
        return a, _Order(None), _Order(None)
    queries, keys = _Order.of(a.q_positions), _Order.of(a.k_positions)
    inputs = {"q": queries.sorted(a.q), "k": keys.sorted(a.k), "v": keys.sorted(a.v)}
    places = {"q_positions": queries.sorted(a.q_positions), "k_positions": keys.sorted(a.k_positions)}
    return a._replace(**inputs, **places), queries, keys


def _keys(a: Any) -> int:
    m: int = a.k.shape[1]
    return m if a.left < 0 or a.right < 0 else min(m, a.left + a.right + 1)


def _runs(a: Any) -> dict[str, Any]:
    """The first key that each query sees, and the one after the last, int32 ``(l)`` or ``(b, l)``."""
    l, m = a.q.shape[1], a.k.shape[1]
    if a.q_positions is None:
        place = torch.arange(m - l, m, dtype=torch.int32)
        firsts = (place - a.left).clamp(0, m) if a.left >= 0 else torch.zeros_like(place)
        ends = (place + a.right + 1).clamp(0, m) if a.right >= 0 else torch.full_like(place, m)
    else:
        place, keys = a.q_positions.contiguous(), a.k_positions.contiguous()
        firsts, ends = torch.zeros_like(place), torch.full_like(place, m)
        if a.left >= 0:
            firsts = torch.searchsorted(keys, place - a.left, out_int32=True)
        if a.right >= 0:
            ends = torch.searchsorted(keys, place + a.right, right=True, out_int32=True)
    return {"firsts": firsts, "ends": ends, "run_batch": 0 if firsts.ndim == 1 else l}
