"""A call of ``tiled`` in parts, each a few heads whose tiles fit the cache, laid out as matrix products want them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.attention._tiles import Blocks, Lists, Placed, Tile, Window

ROWS, COLUMNS = 256, 512  # queries and keys of a tile, at most
LEAST_ROWS = 64  # even where a window is narrower
ELEMENTS = 2**20  # logits of a tile over all heads of a part
COPIED = 2**23  # keys' elements of a part, which is laid out anew
LOG2E, LN2 = math.log2(math.e), math.log(2)


@dataclass(frozen=True)
class Call:
    """What has no gradient: sequences as spans of queries and of keys, masks, and constants."""

    sequences: list[tuple[slice, slice]]
    lists: Lists | None
    left: int
    right: int
    scale: float
    softcap: float
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None

    @property
    def factor(self) -> float:
        """Of queries times keys: what gives logits to base 2, or what goes into the softcap's tanh."""
        return self.scale / self.softcap if self.softcap > 0 else self.scale * LOG2E


@dataclass(frozen=True)
class Part:
    """Some heads of one sequence, or of the same span of several.

    Tensors become (n r d) and (n c d): n sequences times heads of keys, r queries times the query heads that share
    keys (the heads change fastest), c keys. Where each head has a mask of its own, n counts query heads instead.

    Attributes:
        groups: query heads within r.
        heads_of_keys: those of the part, as ``heads`` are its query heads.
    """

    call: Call
    plan: Window | Blocks
    batch: slice
    queries: slice
    keys: slice
    heads: slice
    heads_of_keys: slice
    groups: int

    @functools.cached_property
    def sequences(self) -> int:
        return self.batch.stop - self.batch.start

    @functools.cached_property
    def outer(self) -> int:
        """Heads that n counts."""
        return (self.heads.stop - self.heads.start) // self.groups

    def tiles(self) -> Iterator[tuple[slice, Iterator[Tile]]]:
        """Runs of rows, and the tiles that each of them has to meet."""
        for queries in self.plan.queries():
            rows = slice(queries.start * self.groups, queries.stop * self.groups)
            if isinstance(self.plan, Blocks):
                yield rows, self.plan.tiles(queries, self.heads)
            else:
                yield rows, self.plan.tiles(queries)

    def rows(self, x: Tensor) -> Tensor:
        """(b l h d) → (n r d), in the precision of sums."""
        x = x[self.batch, self.queries, self.heads].to(precision(x)).unflatten(2, (self.outer, self.groups))
        return x.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1).contiguous()

    def put_rows(self, whole: Tensor, x: Tensor) -> None:
        """Writes (n r d) where :meth:`rows` took it from."""
        x = x.view(self.sequences, self.outer, -1, self.groups, x.shape[2]).permute(0, 2, 1, 3, 4)
        whole[self.batch, self.queries, self.heads] = x.flatten(2, 3)

    def columns(self, x: Tensor) -> Tensor:
        """(b m h_kv d) → (n c d), in the precision of sums; filled up to whole blocks under a block mask."""
        x = x[self.batch, self.keys, self.heads_of_keys].to(precision(x)).transpose(1, 2).flatten(0, 1)
        if isinstance(self.plan, Window):
            return x.contiguous()
        filled = x.new_zeros(len(x), self.plan.columns * self.plan.lists.block_k, x.shape[2])
        filled[:, self.plan.before : self.plan.before + x.shape[1]] = x
        return filled

    def put_columns(self, whole: Tensor, x: Tensor) -> None:
        """Writes (n c d) where :meth:`columns` took it from."""
        start = self.plan.before if isinstance(self.plan, Blocks) else 0
        x = x[:, start : start + self.keys.stop - self.keys.start].unflatten(0, (self.sequences, -1))
        whole[self.batch, self.keys, self.heads_of_keys] = x.transpose(1, 2)

    def row_sums(self, x: Tensor) -> Tensor:
        """(b h l) → (n r)."""
        x = x[self.batch, self.heads, self.queries].unflatten(1, (self.outer, self.groups))
        return x.transpose(2, 3).flatten(2, 3).flatten(0, 1)

    def put_row_sums(self, whole: Tensor, x: Tensor) -> None:
        """Writes (n r) where :meth:`row_sums` takes it from."""
        x = x.view(self.sequences, self.outer, -1, self.groups).transpose(2, 3)
        whole[self.batch, self.heads, self.queries] = x.flatten(1, 2)

    def per_head(self, x: Tensor) -> Tensor:
        """(h) → (outer groups), in the precision of sums."""
        return x[self.heads].to(precision(x)).view(self.outer, self.groups)

    def per_row(self, x: Tensor, rows: slice) -> Tensor:
        """(outer groups) → (n r), the same for each query of these rows."""
        queries = (rows.stop - rows.start) // self.groups
        return x.repeat(self.sequences, queries).view(self.sequences * self.outer, queries * self.groups)

    def sum_by_head(self, x: Tensor) -> Tensor:
        """(n r) → (heads of the part)."""
        return x.view(self.sequences, self.outer, -1, self.groups).sum((0, 2)).flatten()

    def spread(self, x: Tensor) -> Tensor:
        """A tile (n r c) as (sequences, outer, queries, groups, c)."""
        return x.view(self.sequences, self.outer, -1, self.groups, x.shape[2])

    def take(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's keys or values, out of (n c d)."""
        if isinstance(tile.keys, slice):
            return x[:, tile.keys]
        blocks, index = self._blocks(x, tile.keys)
        return blocks.index_select(0, index).view(self.sequences * self.outer, -1, x.shape[2])

    def add(self, x: Tensor, tile: Tile, a: Tensor, b: Tensor) -> None:
        """Adds the matrix product of a and b to what :meth:`take` gives."""
        if isinstance(tile.keys, slice):
            x[:, tile.keys].baddbmm_(a, b)
            return
        blocks, index = self._blocks(x, tile.keys)
        blocks.index_add_(0, index, torch.bmm(a, b).view(len(index), *blocks.shape[1:]))

    def _blocks(self, x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """All blocks of (n c d) in one row, and the places among them of ``columns`` (outer or 1, c)."""
        assert isinstance(self.plan, Blocks)
        heads = len(x) // self.sequences  # of keys, each for outer // heads of those that n counts
        own = torch.arange(self.outer, device=x.device) // (self.outer // heads)
        own = own + heads * torch.arange(self.sequences, device=x.device)[:, None]  # (sequences outer)
        index = own[..., None] * self.plan.columns + columns
        return x.view(-1, self.plan.lists.block_k, x.shape[2]), index.flatten()


def parts(call: Call, q: Tensor, k: Tensor, distances: bool) -> Iterator[Part]:
    """The parts of a call: sequences one after another, and so many heads at once as ``ELEMENTS`` allows.

    Args:
        distances: whether tiles are to tell how far their keys are.
    """
    h, h_kv = q.shape[2], k.shape[2]
    shared = call.q_positions is None  # a plan, by all of the batch
    own = call.lists is not None and call.lists.heads > 1  # masks of their own, not to be shared in a group
    for queries, keys in call.sequences:
        l, m = queries.stop - queries.start, keys.stop - keys.start
        rows, columns = tile_size(l, m, call.left, call.right) if shared else tile_size(l, m, -1, -1)
        size = (l, m, call.left, call.right, rows, columns)
        at_once = max(1, min(ELEMENTS // (h // h_kv * rows * columns), COPIED // max(1, m * k.shape[3])))
        heads_at_once, batch_at_once = min(h_kv, at_once), max(1, at_once // h_kv) if shared else 1
        plan = None
        for row in range(0, q.shape[0], batch_at_once):
            if plan is None or not shared:
                window = _window(call, size, q, (row, queries, keys), distances)
                plan = window if call.lists is None else Blocks(window, call.lists, queries.start, keys.start)
            for head in range(0, h_kv, heads_at_once):
                end = min(h_kv, head + heads_at_once)
                yield Part(
                    call=call,
                    plan=plan,
                    batch=slice(row, min(q.shape[0], row + batch_at_once)),
                    queries=queries,
                    keys=keys,
                    heads=slice(head * h // h_kv, end * h // h_kv),
                    heads_of_keys=slice(head, end),
                    groups=1 if own else h // h_kv,
                )


def _window(
    call: Call, size: tuple[int, int, int, int, int, int], q: Tensor, place: tuple[int, slice, slice], distances: bool
) -> Window:
    like = torch.empty(0, dtype=precision(q), device=q.device)
    if call.q_positions is None or call.k_positions is None:
        return Window(*size, like, distances)
    row, queries, keys = place
    q_positions, k_positions = call.q_positions[row, queries], call.k_positions[row, keys]
    return Placed(*size, like, distances, q_positions=q_positions, k_positions=k_positions)


def tile_size(l: int, m: int, left: int, right: int) -> tuple[int, int]:
    """Queries and keys of a tile: within a narrow window all keys at once, and half as many queries as it is wide."""
    rows, columns = ROWS, COLUMNS
    if left >= 0 and right >= 0:
        rows = min(rows, max(LEAST_ROWS, (left + right) // 2))
        columns = max(columns, rows + left + right) if rows + left + right <= 2 * COLUMNS else columns
        columns = min(columns, rows + left + right)
    return max(1, min(rows, l)), max(1, min(columns, m))
