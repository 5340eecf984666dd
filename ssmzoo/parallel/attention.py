"""Attention over cuts, in one of four ways. Unless forced, it holds no more keys than its own and those of two parts.

- ``"window"``: keys and values are sent to whoever's windows reach them, before anything is computed.
- ``"heads"``: each process gets whole sequences of its share of the heads (:mod:`ssmzoo.parallel.channels`).
- ``"ring"``: keys and values go round (:mod:`ssmzoo.parallel.ring`). Later parts see more keys than earlier ones, so
  where that is uneven tokens are first dealt out anew, an early and a late piece to each process
  (:meth:`ssmzoo.parallel.layout.Layout.folded`), and outputs go back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ssmzoo.parallel.balanced import Balanced
from ssmzoo.parallel.channels import to_channels, to_tokens
from ssmzoo.parallel.inputs import Inputs
from ssmzoo.parallel.kept import Here, attended
from ssmzoo.parallel.layout import Layout, moves
from ssmzoo.parallel.plan import Plan
from ssmzoo.parallel.ring import Ring
from ssmzoo.parallel.share import share
from ssmzoo.parallel.side import Side

Given = Mapping[str, Any]


def attend(side: Side, call: Callable[..., Any], given: Given) -> Any:
    """Attention of this part's queries.

    Raises:
        ValueError: a call whose queries do not stand at the ends of the keys that they see; a forced way that it
            cannot go.
    """
    for name in ("block_mask", "cu_seqlens_k", "q_positions", "k_positions"):
        if given[name] is not None:
            raise ValueError(f"ssmzoo.parallel: attention over cuts needs `{name}` to be None")
    plan = Plan.of(side.layout, side.how, given)
    side.note("attention", plan.told(side.line.rank), plan.traffic(plan.how, side.line.rank))
    ways = {"window": _windows, "heads": _heads, "ring": _round, "balanced": _balanced}
    out, lse = ways[plan.how](side, call, given, plan)
    return (out, lse) if given["return_lse"] else out


def _windows(side: Side, call: Callable[..., Any], given: Given, plan: Plan) -> tuple[Tensor, Tensor | None]:
    line, layout, k, v = side.line, side.layout, given["k"], given["v"]
    have, seen = zip(*((layout.spans(r), plan.spans(r)) for r in range(line.ranks)), strict=True)
    way = moves(list(have), [[(a, b) for a, b in spans if a < b] for spans in seen], line.rank)
    keys, values = line.move(torch.cat([k.flatten(2), v.flatten(2)], dim=-1)[0], way)[None].split(
        [k.shape[2:].numel(), v.shape[2:].numel()], dim=-1
    )
    lengths = accumulate((b - a for a, b in seen[line.rank]), initial=0)
    borders = torch.tensor(list(lengths), dtype=torch.int32, device=k.device)
    keys, values = keys.unflatten(-1, k.shape[2:]), values.unflatten(-1, v.shape[2:])
    return _here(side, call, {**given, "k": keys, "v": values, "cu_seqlens_k": borders})


def _heads(side: Side, call: Callable[..., Any], given: Given, plan: Plan) -> tuple[Tensor, Tensor | None]:
    line, layout, q = side.line, side.layout, given["q"]
    h, mine = q.shape[2], share(q.shape[2], line.rank, line.ranks)
    parts = to_channels(line, layout, [given[name][0].flatten(1) for name in ("q", "k", "v")])
    whole = {
        name: part.unflatten(1, (given[name].shape[2] // line.ranks, -1))[None]
        for name, part in zip(("q", "k", "v"), parts, strict=True)
    }
    of_head = {name: None if given[name] is None else given[name][mine] for name in ("alibi_slopes", "sinks")}
    out, lse = _here(side, call, {**given, **whole, **of_head, "cu_seqlens": side.cut.whole_cu_seqlens})
    back = to_tokens(line, layout, out[0].flatten(1), h * out.shape[3]).unflatten(1, (h, -1))[None]
    return back, None if lse is None else to_tokens(line, layout, lse[0].T, h).T[None]


def _here(side: Side, call: Callable[..., Any], given: Given) -> tuple[Tensor, Tensor | None]:
    """Where all that the queries see is here; what is computed again takes its results from the first time."""
    line = side.line
    if line.tape is None and line.again is None:
        found = call(**given)
        return found if given["return_lse"] else (found, None)
    out, lse = attended(Here(line, call, given), Inputs.of(given))
    return out[None], lse[None] if given["return_lse"] else None


def _balanced(side: Side, call: Callable[..., Any], given: Given, plan: Plan) -> tuple[Tensor, Tensor]:
    out, lse = attended(Balanced(side.line, plan.options, plan.schedule), Inputs.of(given))
    return out[None], lse[None]


def _round(side: Side, call: Callable[..., Any], given: Given, plan: Plan) -> tuple[Tensor, Tensor]:
    line, layout, inputs = side.line, plan.parts, Inputs.of(given)
    there, back = _dealt_out(layout, plan.layout, line.rank)
    if there is not None:
        of_tokens = inputs[:3]
        sizes = [t.shape[1:].numel() for t in of_tokens]
        dealt = line.move(torch.cat([t.flatten(1) for t in of_tokens], dim=1), there).split(sizes, dim=1)
        q, k, v = (part.reshape(-1, *t.shape[1:]) for part, t in zip(dealt, of_tokens, strict=True))
        inputs = inputs._replace(q=q, k=k, v=v)
    out, lse = attended(Ring(plan.layout, line, plan.options), inputs)
    if back is not None:
        out = line.move(out.flatten(1), back).reshape(-1, *out.shape[1:])
        lse = line.move(lse.T, back).T if given["return_lse"] else lse
    return out[None], lse[None]


def _dealt_out(layout: Layout, other: Layout, rank: int) -> tuple[Any, Any]:
    """From one layout to the other, and back; None where they are the same."""
    if other is layout:
        return None, None
    have, want = ([each.spans(r) for r in range(len(each.runs))] for each in (layout, other))
    return moves(have, want, rank), moves(want, have, rank)
