"""Which tiles of the (queries, keys) square there is something to see in, and what is hidden inside of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssmkernels.core.block_mask import unpacked


@dataclass(frozen=True)
class Tile:
    """Keys that a run of queries meets at once.

    Attributes:
        keys: a slice of them; or int64 ``(h or 1, c)``, numbers of blocks for each head. They count from the start of
            the block in which the sequence's first key lies, the blocks likewise.
        bias: ``(h or 1, queries, 1, keys)``, -∞ where a key is hidden, else 0; None where all is visible. An addition
            is many times faster than writing where a bool says so.
        far: likewise |j - p|; None where nobody asks for it.
    """

    keys: slice | Tensor
    bias: Tensor | None
    far: Tensor | None


@dataclass
class Window:
    """One sequence of ``l`` queries and ``m`` keys under a window: tiles of at most ``rows`` by ``columns``.

    Tiles have the dtype and device of ``like``; with ``distances`` they tell how far their keys are.
    """

    l: int
    m: int
    left: int
    right: int
    rows: int
    columns: int
    like: Tensor
    distances: bool
    _seen_before: dict[tuple[int, int, int], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def reach(self, queries: slice) -> tuple[int, int]:
        """The first key that any of these queries may see, and the one after the last."""
        first, last = queries.start + self.m - self.l, queries.stop - 1 + self.m - self.l
        low = max(0, first - self.left) if self.left >= 0 else 0
        high = min(self.m, last + self.right + 1) if self.right >= 0 else self.m
        return low, max(low, high)

    def tiles(self, queries: slice) -> Iterator[Tile]:
        low, high = self.reach(queries)
        parts = max(1, -(-(high - low) // self.columns))
        borders = [low + (high - low) * part // parts for part in range(parts + 1)]
        for start, end in zip(borders, borders[1:], strict=False):
            if end > start and self.meets(queries, start, end):
                yield self._tile(queries, start, end)

    def _tile(self, queries: slice, start: int, end: int) -> Tile:
        crosses = self.crosses(queries, start, end)
        if not crosses and not self.distances:
            return Tile(slice(start, end), None, None)
        shape = (start - (queries.start + self.m - self.l), queries.stop - queries.start, end - start)
        if shape not in self._seen_before:
            if len(self._seen_before) > 8:  # along a window all tiles but the first and last few are the same
                self._seen_before.clear()
            key = torch.arange(start, end, device=self.like.device)
            self._seen_before[shape] = self._bias_and_far(self.distance(queries, key)[None, :, None], crosses)
        return Tile(slice(start, end), *self._seen_before[shape])

    def _bias_and_far(self, distance: Tensor, crosses: bool) -> tuple[Tensor | None, Tensor | None]:
        return (
            self.bias(self.outside(distance)) if crosses else None,
            distance.abs().to(self.like.dtype) if self.distances else None,
        )

    def distance(self, queries: slice, keys: Tensor) -> Tensor:
        """How far keys ``(…)`` are after these queries: ``(…, queries, keys)``."""
        first = queries.start + self.m - self.l
        position = torch.arange(first, first + queries.stop - queries.start, device=self.like.device)
        return keys[..., None, :] - position[:, None]

    def meets(self, queries: slice, start: int, end: int) -> bool:
        """Whether some of these queries may see some of these keys, which are within their reach."""
        return True

    def bias(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self.like.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)

    def crosses(self, queries: slice, start: int, end: int) -> bool:
        """Whether some of these queries see but some of these keys, as far as the window goes."""
        first, last = queries.start + self.m - self.l, queries.stop - 1 + self.m - self.l
        return (self.left >= 0 and start < last - self.left) or (self.right >= 0 and end - 1 > first + self.right)

    def outside(self, distance: Tensor) -> Tensor:
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.left >= 0:
            hidden |= distance < -self.left
        if self.right >= 0:
            hidden |= distance > self.right
        return hidden

    def queries(self) -> Iterator[slice]:
        for start in range(0, self.l, self.rows):
            yield slice(start, min(self.l, start + self.rows))


@dataclass(kw_only=True)
class Placed(Window):
    """The same by positions of the tokens' own, int32 ``(l)`` and ``(m)``, in any order.

    The least and greatest position of a run of tokens, read once, tell whether a tile is passed over, or seen whole.
    """

    q_positions: Tensor
    k_positions: Tensor
    _extremes: dict[tuple[bool, int, int], tuple[int, int]] = field(default_factory=dict)

    def reach(self, queries: slice) -> tuple[int, int]:
        return 0, self.m

    def meets(self, queries: slice, start: int, end: int) -> bool:
        (first, last), (low, high) = self._ends(queries, start, end)
        return not ((self.left >= 0 and high < first - self.left) or (self.right >= 0 and low > last + self.right))

    def crosses(self, queries: slice, start: int, end: int) -> bool:
        (first, last), (low, high) = self._ends(queries, start, end)
        return (self.left >= 0 and low < last - self.left) or (self.right >= 0 and high > first + self.right)

    def distance(self, queries: slice, keys: Tensor) -> Tensor:
        positions = self.k_positions[keys.clamp(0, self.m - 1)]
        return positions[..., None, :] - self.q_positions[queries, None]

    def _tile(self, queries: slice, start: int, end: int) -> Tile:
        keys, crosses = slice(start, end), self.crosses(queries, start, end)
        if not crosses and not self.distances:
            return Tile(keys, None, None)
        distance = self.k_positions[keys] - self.q_positions[queries, None]
        return Tile(keys, *self._bias_and_far(distance[None, :, None], crosses))

    def _ends(self, queries: slice, start: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Least and greatest positions of these queries, and of the keys among ``start`` … ``end`` - 1."""
        return (
            self._least_and_most(True, queries.start, queries.stop),
            self._least_and_most(False, max(0, start), min(self.m, end)),
        )

    def _least_and_most(self, of_queries: bool, start: int, end: int) -> tuple[int, int]:
        run = (of_queries, start, end)
        if run not in self._extremes:
            positions = (self.q_positions if of_queries else self.k_positions)[start:end]
            low, high = torch.stack(positions.aminmax()).tolist()
            self._extremes[run] = (low, high)
        return self._extremes[run]


class Lists:
    """A block mask's lists, read once: for each head and row, columns and patterns."""

    def __init__(self, offsets: Tensor, columns: Tensor, patterns: Tensor, bits: Tensor, dtype: torch.dtype):
        self.heads = offsets.shape[0]
        self.block_q, self.block_k = bits.shape[1], 8 * bits.shape[2]
        borders, columns_, patterns_ = offsets.tolist(), columns.tolist(), patterns.tolist()
        self.rows = [
            [list(zip(columns_[a:b], patterns_[a:b], strict=True)) for a, b in zip(row, row[1:], strict=False)]
            for row in borders
        ]
        nothing = bits.new_zeros(1, *bits.shape[1:])
        self.bits = torch.cat([nothing, ~nothing, bits])  # for -2, which fills up the shorter lists, -1, 0 ...
        every = torch.arange(256, dtype=torch.uint8, device=bits.device)[:, None]
        self.bias = torch.zeros(256, 8, dtype=dtype, device=bits.device)  # of 8 keys, for each byte that they may make
        self.bias.masked_fill_(~unpacked(every), -torch.inf)


@dataclass
class Blocks:
    """One sequence under a block mask as well; it starts at ``first_query`` and ``first_key`` of the mask's."""

    window: Window
    lists: Lists
    first_query: int
    first_key: int

    @property
    def before(self) -> int:
        """Keys of other sequences in the block where the first key lies."""
        return self.first_key % self.lists.block_k

    @property
    def columns(self) -> int:
        """Blocks from the one with the first key to the one with the last."""
        return -(-(self.before + self.window.m) // self.lists.block_k)

    def queries(self) -> Iterator[slice]:
        start = 0
        while start < self.window.l:
            end = start + self.lists.block_q - (self.first_query + start) % self.lists.block_q
            yield slice(start, min(self.window.l, end))
            start = end

    def tiles(self, queries: slice, heads: slice) -> Iterator[Tile]:
        """For these heads of the queries; for all alike if the mask has but one."""
        block = self.lists.block_k
        row = (self.first_query + queries.start) // self.lists.block_q
        low, high = self.window.reach(queries)
        first, last = (low + self.before) // block, -(-(high + self.before) // block)
        shift = self.first_key // block

        def meets(number: int) -> bool:
            start = number * block - self.before
            return self.window.meets(queries, start, start + block)

        seen = [
            [(c - shift, pattern) for c, pattern in rows[row] if first <= c - shift < last and meets(c - shift)]
            for rows in (self.lists.rows[heads] if self.lists.heads > 1 else self.lists.rows)
        ]
        most = max((len(entries) for entries in seen), default=0)
        at_once = max(1, self.window.columns // block)
        for start in range(0, most if high > low else 0, at_once):
            yield self._tile(queries, [entries[start : start + at_once] for entries in seen])

    def _tile(self, queries: slice, entries: list[list[tuple[int, int]]]) -> Tile:
        block, device = self.lists.block_k, self.window.like.device
        wide = max(map(len, entries))
        filled = [[*row, *[(0, -2)] * (wide - len(row))] for row in entries]
        columns = [[c for c, _ in row] for row in filled]
        patterns = [[pattern for _, pattern in row] for row in filled]
        least, most = min(map(min, columns)) * block, (max(map(max, columns)) + 1) * block
        cut = least < self.before or most > self.before + self.window.m
        cut = cut or self.window.crosses(queries, least - self.before, most - self.before)
        far = bias = None
        if cut or self.window.distances:
            key = torch.tensor(columns, device=device)[..., None] * block + torch.arange(block, device=device)
            key = key.flatten(1)[:, None, None] - self.before  # (h 1 1 keys)
            distance = self.window.distance(queries, key[:, 0, 0])[:, :, None]  # (h queries 1 keys)
            if cut:
                hidden = self.window.outside(distance) | (key < 0) | (key >= self.window.m)
                bias = self.window.bias(hidden)
            if self.window.distances:
                far = distance.abs().to(self.window.like.dtype)
        if any(pattern != -1 for row in patterns for pattern in row):
            start = (self.first_query + queries.start) % self.lists.block_q
            bits = self.lists.bits[torch.tensor(patterns, device=device) + 2]  # (h c block_q bytes)
            bits = bits[:, :, start : start + queries.stop - queries.start].transpose(1, 2)
            shown = self.lists.bias[bits.int()].flatten(2)[:, :, None]
            bias = shown if bias is None else bias + shown
        run = columns[0][0]
        if len(columns) == 1 and columns[0] == list(range(run, run + wide)):
            keys: slice | Tensor = slice(run * block, (run + wide) * block)
        else:
            keys = torch.tensor(columns, device=device)
        return Tile(keys, bias, far)
