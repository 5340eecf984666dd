"""How each op that mixes along time crosses the cuts: on every process it sees one part of the sequences.

- Recurrences that are linear in their state: processes exchange what their parts do to a state, and each folds those
  before its own into the state that enters its part (:mod:`ssmzoo.parallel.transitions`). What a part does is a sum
  over its tokens for most, and backward likewise (:mod:`ssmzoo.parallel.once`), so that the op runs once. For delta
  rules forward, and both ways for complex numbers and channels by themselves, the op runs from zero before: twice in
  the middle, once in the first and the last part.
- Other recurrences: each process waits for the state of the one before it.
- Convolutions: the last tokens of the parts before. Long ones: whole sequences of some channels
  (:mod:`ssmzoo.parallel.channels`).
- Attention: :mod:`ssmzoo.parallel.attention`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.parallel.adjoints import ADJOINTS
from ssmzoo.parallel.attention import attend
from ssmzoo.parallel.once import run_once
from ssmzoo.parallel.side import Side
from ssmzoo.parallel.steps import FOLDED, WAITS, gathered, handed_on
from ssmzoo.parallel.transitions import TRANSITIONS, Given, Shape, turns
from ssmzoo.state import State

Op = Callable[..., Any]  # takes the public arguments by name, and sees no more than these


@dataclasses.dataclass
class Carried(State):
    """The states of an op, on their way to another process."""

    parts: list[Tensor]


def fold(name: str, side: Side, call: Op, given: Given) -> Any:
    """A recurrence that is linear in its state."""
    transition = TRANSITIONS[name]
    cut, line, rank = side.cut, side.line, side.cut.rank
    names = [name for name in given if name.startswith("initial_")]
    given = {**given, "return_final_state": True}
    states, transitions, dtype = transition.like(given)
    found: Any = None
    if rank == 0 and not transition.summed:  # knows the state that enters
        found = call(**given)
        E, M = list(found[1:]), _zeros(transitions, given, dtype)
    elif rank < cut.ranks - 1 or side.keeps:
        E, M = transition.found(call, {**given, **dict.fromkeys(transition.enters, None)})
    else:  # nobody needs what it leaves
        E, M = _zeros(states, given, dtype), _zeros(transitions, given, dtype)
    exchanged = [t.to(dtype) for t in (*E, *M)]
    side.note(name, FOLDED, gathered(torch.cat([t.flatten() for t in exchanged]), cut.ranks))
    parts = [(of_rank[: len(E)], of_rank[len(E) :]) for of_rank in line.gather_each(exchanged)]
    after = [parts[0][0]]  # each part
    if transition.summed:
        zeros = _zeros(states, given, dtype)
        first = [zero if given[each] is None else given[each] for each, zero in zip(names, zeros, strict=True)]
        after = [transition.joined(*parts[0], first)]
    for r in range(1, cut.ranks if side.keeps else rank):
        after.append(transition.joined(*parts[r], after[-1]))
    if rank > 0:
        entering = dict(zip(names, after[rank - 1], strict=True))
        given = {**given, **{name: entering[name] for name in transition.enters}}
    if found is None:
        found = call(**given)
    return found[0], *(after[-1] if side.keeps else found[1:])


def turning(side: Side, call: Op, given: Given) -> Any:
    """Mamba-3's recurrence: linear in its state once it is known how far its maps have turned."""
    before = given["initial_angle"]
    turned = turns(given)
    side.note("mamba3_scan", "processes add up how far their parts turn", gathered(turned, side.cut.ranks))
    parts = side.line.gather(turned)[: side.cut.rank]
    wide = precision(given["x"])
    angle = parts.sum(0) + (0 if before is None else before.double())
    angle = angle - 2 * math.pi * torch.round(angle.detach() / (2 * math.pi))
    return fold("mamba3_scan", side, call, {**given, "initial_angle": angle.to(wide)})


def _zeros(shapes: list[Shape], given: Given, dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype, device=given["cu_seqlens"].device) for shape in shapes]


def in_turn(op: str, side: Side, call: Op, given: Given) -> Any:
    """Any other recurrence, one process after another."""
    line, rank, last = side.line, side.cut.rank, side.cut.ranks - 1
    names = [name for name in given if name.startswith("initial_")]
    device = given["cu_seqlens"].device
    if rank > 0:
        given = {**given, **dict(zip(names, line.receive_state(rank - 1, device).tensors(), strict=True))}
    y, *after = call(**{**given, "return_final_state": True})
    before = [t for name in names if (t := given[name]) is not None]
    side.note(op, WAITS, handed_on(before, after, rank, last + 1, side.keeps), in_turn=True)
    if rank < last:
        line.send_state(rank + 1, Carried(after))
    if side.keeps:
        after = line.broadcast_state(last, Carried(after) if rank == last else None, device).tensors()
    return y, *after


def convolve(side: Side, call: Op, given: Given) -> Any:
    """A causal convolution."""
    width = given["weight"].shape[-1] - 1
    before, after = side.window(given["x"], given["initial_state"], width)
    return call(**{**given, "initial_state": before, "return_final_state": True})[0], after


def convolve_long(side: Side, call: Op, given: Given) -> Any:
    """A convolution as long as the sequence."""
    u, gate, mine = given["u"], given["gate"], side.share(given["u"].shape[-1])
    u, *gates = side.channels([u] if gate is None else [u, gate])
    own = {name: None if (t := given[name]) is None else t[mine] for name in ("kernel", "D", "kernel_reverse")}
    changed = {**own, "u": u, "gate": gates[0] if gates else None, "cu_seqlens": side.cut.whole_cu_seqlens}
    return side.tokens(call(**{**given, **changed}), given["u"].shape[-1])


IN_TURN = ("slstm",)


def cross(side: Side, name: str, call: Op, given: Given) -> Any:
    """The op of this name on this part.

    Raises:
        ValueError: it has no way over the cuts.
    """
    wanted = given.get("return_final_state", True)
    if name == "attention":
        return attend(side, call, given)
    if name == "fft_conv":
        return convolve_long(side, call, given)
    if name == "mamba3_scan":
        found = turning(side, call, given)
    elif name in ADJOINTS and ADJOINTS[name].can(given):
        found = run_once(name, side, call, given)
    elif name in TRANSITIONS:
        found = fold(name, side, call, given)
    elif name in IN_TURN:
        found = in_turn(name, side, call, given)
    elif name == "causal_conv1d":
        found = convolve(side, call, given)
    else:
        raise ValueError(
            f"ssmzoo.parallel: `{name}` cannot cross a cut by itself; `crosses_in_ops` must be False for the mixer "
            f"around it"
        )
    return found if wanted else found[0]
