"""How the native long convolution lays sequences out on circles, and the roots that its transform needs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch
from torch import Tensor

SMALLEST, LARGEST = 64, 2**19  # complex points of a circle, each for two real ones
CACHED = 4096  # points from which a transform leaves a core's own cache


@dataclasses.dataclass(frozen=True)
class Layout:
    """Blocks of a sequence, on circles of 2 · ``points`` places.

    A circle has a window of the sequence: a block of outputs with the inputs that they see. Where one block takes the
    whole sequence there is nothing around it to be seen.

    Attributes:
        points: 4^k times 1, 2 or 3.
        block: outputs of a circle.
        blocks: of a sequence.
        after, before: how far an output sees back and ahead.
    """

    points: int
    block: int
    blocks: int
    after: int
    before: int

    def lead(self, adjoint: bool) -> int:
        """The place of a block's first output in the window of what is convolved."""
        if self.blocks == 1:
            return 0
        return self.before if adjoint else self.after


@functools.lru_cache(maxsize=1024)
def lay_out(length: int, taps: int, ahead: int) -> Layout | None:
    """The cheapest layout of a sequence, ``taps`` from lag 0 on and ``ahead`` from lag -1 on; None if there is none.

    It does not depend on the sequence's neighbours in a batch, and nothing else than it decides how sums are rounded.
    """
    after, before = max(min(taps, length) - 1, 0), min(ahead, max(length - 1, 0))
    found = [Layout(points, 2 * points, 1, after, before) for points in _at_least(length + max(after, before))[:1]]
    for points in _at_least(2 * (after + before) + 1):
        block = 2 * points - after - before
        if block >= length:
            break
        found.append(Layout(points, block, -(-length // block), after, before))
    return min(found, key=_cost, default=None)


def has_layout(length: int, taps: int, ahead: int) -> bool:
    """Whether :func:`lay_out` finds one: in a compiler's reach, which follows neither its cache nor its search."""
    after, before = max(min(taps, length) - 1, 0), min(ahead, max(length - 1, 0))
    return min(length + max(after, before), 2 * (after + before) + 1) <= 2 * LARGEST


def _cost(layout: Layout) -> float:
    work = layout.blocks * layout.points * (math.log2(layout.points) + 4)
    return work * (1.3 if layout.points > CACHED else 1)


def _at_least(places: int) -> list[int]:
    """Sizes of circles with so many places."""
    return [points for points in SIZES if 2 * points >= places]


SIZES = sorted(
    size for k, leaf in itertools.product(range(3, 11), (1, 2, 3)) if SMALLEST <= (size := leaf * 4**k) <= LARGEST
)


@dataclasses.dataclass(frozen=True)
class Roots:
    """Attributes:
    quarters: ``(nodes 6)``, of each node of the transform's tree r, r² and r³ with r⁴ = c.
    thirds: ``(leaves 4)``, r and r² with r³ = c, where leaves have three points; else empty.
    first_leaf: the number of the first of them.
    """

    quarters: Tensor
    thirds: Tensor
    first_leaf: int


@functools.lru_cache(maxsize=32)
def roots(points: int, dtype: torch.dtype) -> Roots:
    """The roots for circles of so many points, by turns: c of node 0 is a quarter turn, i; each is rounded once."""
    turns, levels = torch.tensor([0.25], dtype=torch.float64), [torch.empty(0, dtype=torch.float64)]
    left = points
    while left >= 4:
        levels.append(turns)
        turns, left = ((turns[:, None] + torch.arange(4)) / 4).flatten(), left // 4
    first_leaf = sum(map(len, levels))
    if left > 1:
        levels.append(turns)
    return Roots(
        _powers(torch.cat(levels) / 4, 3).to(dtype),
        _powers(turns / 3, 2).to(dtype) if left == 3 else torch.empty(0, dtype=dtype),
        first_leaf,
    )


def _powers(turns: Tensor, count: int) -> Tensor:
    """exp(2πi turns) and its powers up to ``count``: (n 2·count), real and imaginary parts."""
    angle = 2 * math.pi * (turns[:, None] * torch.arange(1, count + 1) % 1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)
