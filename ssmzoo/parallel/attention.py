"""Attention over cuts: each process gets the keys and values that its queries see, and no others.

A process sends its tokens to the processes after it whose windows reach them. Those of processes that no window reaches
are not sent. What arrives stays until the backward pass, so that the last process holds the keys and values of all
tokens that it sees, but no scores: the op computes these in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.side import Side
from ssmzoo.parallel.steps import of_keys
from ssmzoo.parallel.transitions import Given


def seen(cut: Cut, rank: int, left: int) -> list[tuple[int, int]]:
    """From where to where the queries of a part see, in each sequence; ``left`` tokens before their own, -1 for all."""
    spans = []
    for s in range(cut.sequences):
        start = sum(part[s] for part in cut.counts[:rank])
        count = cut.counts[rank][s]
        first = 0 if left < 0 else max(0, start - left)
        spans.append((first, start + count) if count else (start, start))
    return spans


def shared(cut: Cut, source: int, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of these spans is in a part: from where to where in each sequence's part."""
    found = []
    for s, (first, end) in enumerate(spans):
        start = sum(part[s] for part in cut.counts[:source])
        count = cut.counts[source][s]
        low, high = min(max(first - start, 0), count), min(max(end - start, 0), count)
        found.append((low, max(low, high)))
    return found


def attend(side: Side, call: Callable[..., Any], given: Given) -> Any:
    """Causal attention of this part's queries.

    Raises:
        ValueError: a call whose queries do not stand at the ends of the keys that they see.
    """
    for name in ("block_mask", "cu_seqlens_k", "q_positions", "k_positions"):
        if given[name] is not None:
            raise ValueError(f"ssmzoo.parallel: attention over cuts needs `{name}` to be None")
    window = given["window"]
    if not given["causal"] and (window is None or window[1] != 0):
        raise ValueError("ssmzoo.parallel: attention over cuts must be `causal`")
    cut, line, k, v = side.cut, side.line, given["k"], given["v"]
    both = torch.cat([k.flatten(2), v.flatten(2)], dim=-1)[0]  # (l channels)
    left = -1 if window is None else window[0]
    mine = seen(cut, cut.rank, left)
    offsets = list(accumulate(cut.counts[cut.rank], initial=0))
    sends = []
    for rank in range(cut.ranks):
        wanted = shared(cut, cut.rank, seen(cut, rank, left)) if rank >= cut.rank else []
        sends.append(_places((offset + a, offset + b) for offset, (a, b) in zip(offsets, wanted, strict=False)))
    receives = [shared(cut, source, mine) if source <= cut.rank else [] for source in range(cut.ranks)]
    came = [sum(b - a for a, b in r) for r in receives]
    others = [n for source, n in enumerate(came) if n and source != cut.rank]
    side.note("attention", of_keys(sum(others), len(others)))
    arrived = line.exchange(both, [p.to(k.device) for p in sends], came)
    # From the order of arrival, part by part, to that of sequences
    firsts, begins = list(accumulate(came, initial=0)), []
    for source, spans in enumerate(receives):
        counts = [b - a for a, b in spans]
        begins.append([(firsts[source] + at, n) for at, n in zip(accumulate(counts, initial=0), counts, strict=False)])
    order = _places((at, at + n) for s in range(cut.sequences) for part in begins if part for at, n in (part[s],))
    keys, values = arrived[order.to(k.device)][None].split([math.prod(k.shape[2:]), math.prod(v.shape[2:])], dim=-1)
    lengths = accumulate((b - a for a, b in mine), initial=0)
    borders = torch.tensor(list(lengths), dtype=torch.int32, device=k.device)
    keys, values = keys.unflatten(-1, k.shape[2:]), values.unflatten(-1, v.shape[2:])
    return call(**{**given, "k": keys, "v": values, "cu_seqlens_k": borders})


def _places(spans: Any) -> Tensor:
    """int64: all places of these spans, one after another."""
    return torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in spans)])
