"""The state of attention in pages, which clones and selections share until one of them is written to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.ops.decode_attention.token import Place
from ssmzoo.cache.elastic import new_pool
from ssmzoo.cache.kv import KVCache
from ssmzoo.cache.logits import Logits
from ssmzoo.cache.pages import Holding, on_device
from ssmzoo.cache.tokens import TokenCache, laid_out
from ssmzoo.state import State, row_indices

C = TypeVar("C", bound="PagedCache")
P = ParamSpec("P")


def on_host(method: Callable[P, None]) -> Callable[P, None]:
    """Keeps a compiler out, which would compile lists of pages into its code and that anew for each new page.

    It is ``torch.compiler.disable`` without its import of the whole compiler, a second of start-up.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return run


@dataclasses.dataclass
class PagedCache(TokenCache):
    """Keys and values in pages of a pool; further attributes as :class:`TokenCache` has them.

    A clone or selection holds the same pages in the same pool. A page that more than one sequence holds is copied
    before it is written to, and one that nobody holds any more is free for any of them. Tensors other than the pool's
    are never changed, only replaced, and so are shared as well.

    Where gradients flow, the pages move to a pool of their own at each call, and none is written to twice.

    Attributes:
        block_table: int32 ``(s, blocks)``: of a sequence's tokens those from ``starts`` on lie in these pages, one
            after another; what lies past them, in a page or in the table, has no meaning.
        pages: the same on the host, and the pool.
        counts: tokens of each sequence that are here.
        starts: dropped are whole pages.
        longest: the largest of ``counts``.
    """

    dense_class: ClassVar[type[KVCache]] = KVCache  # the same in one stretch of memory

    lengths: Tensor
    block_table: Tensor
    pages: Holding
    counts: list[int]
    starts: Tensor | None = None
    keep: int | None = None
    longest: int = 0
    even: bool = True

    @classmethod
    def empty(
        cls: type[C], like: Tensor, shape: tuple[int, int, int, int], capacity: int, keep: int | None, page_size: int
    ) -> C:
        """No tokens yet.

        Args:
            like: gives dtype and device.
            shape: s, h_kv, and the head dims of keys and of values.
            capacity: positions to set aside for each sequence, but never more than it will use.
            keep: as the attribute.
            page_size: tokens of a page.
        """
        s, h_kv, *head_dims = shape
        blocks = -(-capacity // page_size)
        blocks = blocks if keep is None else min(blocks, _blocks(keep, page_size))
        keys, values = (like.new_zeros(0, page_size, h_kv, head_dim) for head_dim in head_dims)
        pool = new_pool(keys, values)
        pool.grow(s * blocks)
        pages = Holding(pool, [[] for _ in range(s)])
        lengths = torch.zeros(s, dtype=torch.int32, device=like.device)
        return cls(lengths, pages.table(), pages, [0] * s, None if keep is None else lengths, keep)

    def clone(self: C) -> C:
        """A copy that shares all pages until one of the two writes."""
        return dataclasses.replace(self, pages=self.pages.select(range(len(self.counts))))

    def select(self: C, indices: Tensor | Sequence[int]) -> C:
        """As :meth:`State.select`; shares pages. A tensor of indices is read on the host."""
        index = row_indices(indices, lambda: self.n_sequences)
        selected = super().select(index)
        chosen = index.tolist()
        selected.pages = self.pages.select(chosen)
        selected._count([self.counts[i] for i in chosen])
        return selected

    def closed_up(self: C, rows: Sequence[int]) -> C:
        """As :meth:`State.closed_up`: a selection, which copies no page, as tensors may be others' too."""
        return self.select(rows)

    def stored(self) -> State:  # type: ignore[override]
        """What it holds, in one stretch of memory."""
        keys, values, _ = self.recent(self.longest, -1)
        rest = (None if self.starts is None else self.starts.clone(), self.keep, self.longest, self.even)
        return self.dense_class(keys, values, self.lengths.clone(), *rest)

    def restored(self: C, stored: State) -> C:
        """What :meth:`stored` gave of a cache of one sequence, in this one's pool."""
        assert isinstance(stored, KVCache)
        cache = self.clone()
        cache.append(stored.keys, stored.values, False)
        cache.lengths, cache.starts = stored.lengths, stored.starts
        return cache

    def serves(self, kind: type[State]) -> bool:
        """Also in the place of the same cache without pages."""
        return super().serves(kind) or self.dense_class is kind

    def _concatenated(self: C, states: Sequence[C]) -> C:
        if self.pages.pool.fixed:
            self._move(lambda x: x, fixed=False)
        pages = Holding.concatenate([state.pages for state in states])
        lengths = torch.cat([state.lengths for state in states])
        starts = None if self.starts is None else torch.cat([s.starts for s in states if s.starts is not None])
        joined = dataclasses.replace(
            self, lengths=lengths, starts=starts, pages=pages, block_table=pages.table(), counts=[]
        )
        joined._count([count for state in states for count in state.counts])
        return joined

    def to(self: C, *args: Any, **kwargs: Any) -> C:
        """As :meth:`State.to`, in a pool of its own."""
        moved = super().to(*args, **kwargs)
        moved._move(lambda x: x.to(*args, **kwargs), self.pages.pool.fixed)
        return moved

    def tensors(self) -> list[Tensor]:
        """Every tensor in it; the pool's are those of clones and selections too."""
        return [*super().tensors(), self.pages.pool.keys, self.pages.pool.values]

    @on_host
    def append(self, k: Tensor, v: Tensor, differentiable: bool) -> None:
        s, l = k.shape[:2]
        self._make_room([l] * s, k.dtype, differentiable)
        self._write([l] * s, k, v)
        self.lengths = self.lengths + l

    @on_host
    def append_packed(self, k: Tensor, v: Tensor, cu_seqlens: Tensor, differentiable: bool) -> None:
        new = cu_seqlens.diff()
        on_host = new.tolist()
        self._make_room(on_host, k.dtype, differentiable)
        self._write(on_host, k, v)
        self.lengths = self.lengths + new

    @property
    def heads(self) -> tuple[torch.Size, torch.Size]:
        return self.pages.pool.keys.shape[2:], self.pages.pool.values.shape[2:]

    @property
    def layout(self) -> tuple[object, ...] | None:
        pool, rows = self.pages.pool, len(self.counts)
        return laid_out(self, pool.keys, pool.values, rows) if type(self) is PagedCache else None

    def take_token(self, dtype: torch.dtype) -> Place:
        before = torch.tensor(self.counts, dtype=torch.int32)
        self._make_room([1] * len(self.counts), dtype, False)
        positions, pool = self.lengths, self.pages.pool
        self.lengths = positions + 1
        return Place(pool.keys, pool.values, self.block_table, positions, before, before + 1, self.longest)

    def at(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.pages.pool
        place = self.block_table[row, position // pool.page_size], position % pool.page_size
        return pool.keys[place], pool.values[place]

    def recent(self, count: int, before: int) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`TokenCache.recent`, in a copy."""
        pool = self.pages.pool
        start = max(0, self.longest - count - before) if before >= 0 and self.even else 0
        first = start // pool.page_size
        table = self.block_table[:, first : -(-self.longest // pool.page_size)]
        here = slice(start - first * pool.page_size, self.longest - first * pool.page_size)
        k, v = (
            x.index_select(0, table.flatten()).unflatten(0, table.shape).flatten(1, 2)[:, here]
            for x in (pool.keys, pool.values)
        )
        return k, v, self.held - start

    def cached(self, q: Tensor, logits: Logits) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As :meth:`TokenCache.cached`; no table where gradients may flow, as no op that has them reads pages."""
        pool = self.pages.pool
        return super().cached(q, logits) if pool.fixed else (pool.keys, pool.values, self.held, self.block_table)

    @on_host
    def trim(self) -> None:
        """Gives back pages that no token to come will see, and memory where many more are free than it will need."""
        if self.keep is None or self.starts is None:
            return
        pool, rows = self.pages.pool, self.pages.rows
        gone = [max(0, count - self.keep) // pool.page_size for count in self.counts]
        if not any(gone):
            return
        for row, blocks in zip(rows, gone, strict=True):
            pool.release(row[:blocks])
            del row[:blocks]
        dropped = [blocks * pool.page_size for blocks in gone]
        self.starts = self.starts + on_device(dropped, self.starts.device)
        self._count([count - n for count, n in zip(self.counts, dropped, strict=True)])
        needed = len(rows) * _blocks(self.keep, pool.page_size)
        if len(pool.owners) > 2 * needed and not pool.fixed and not pool.lasting and not self.pages.shared:
            self._move(lambda x: x, fixed=False)
            self.pages.pool.grow(max(0, needed - self.pages.pool.in_use))
        self.block_table = self.pages.table()

    def _count(self, counts: list[int]) -> None:
        self.counts, self.longest = counts, max(counts, default=0)
        self.even = min(counts, default=0) == self.longest

    def _move(self, convert: Callable[[Tensor], Tensor], fixed: bool) -> None:
        """Into a pool of its own."""
        self.pages = self.pages.moved(convert, fixed)
        self.block_table = self.pages.table()

    def _make_room(self, new: list[int], dtype: torch.dtype, differentiable: bool) -> None:
        """Pages of its own for so many more tokens of each sequence, which count as held from now on."""
        pool = self.pages.pool
        if differentiable or pool.fixed or pool.keys.dtype != dtype:
            self._move(lambda x: x.to(dtype), differentiable)
            if not differentiable:
                self.pages.pool.grow(len(pool.free))
        counts = [count + l for count, l in zip(self.counts, new, strict=True)]
        wanted = self._wanted(counts)
        if wanted:
            self._claim(wanted)
        self._count(counts)

    def _wanted(self, counts: list[int]) -> list[tuple[int, int]]:
        """Sequence and block of each page that it takes to hold so many tokens of each sequence."""
        pool, size = self.pages.pool, self.pages.pool.page_size
        wanted: list[tuple[int, int]] = []
        for i, (row, before, after) in enumerate(zip(self.pages.rows, self.counts, counts, strict=True)):
            shared = before % size > 0 and after > before and pool.owners[row[-1]] > 1
            wanted += [(i, j) for j in range(len(row) - shared, -(-after // size))]
        return wanted

    def _claim(self, wanted: list[tuple[int, int]]) -> None:
        """Takes a page for each of these blocks: a copy of the one that was there, or a free one at the end."""
        pool, rows = self.pages.pool, self.pages.rows
        taken = pool.take(len(wanted))
        sources, targets = [], []
        for (i, j), page in zip(wanted, taken, strict=True):
            if j < len(rows[i]):
                sources.append(rows[i][j])
                targets.append(page)
                rows[i][j] = page
            else:
                rows[i].append(page)
        if sources:
            pool.copy(sources, targets)
            pool.release(sources)
        more = max(0, max(j for _, j in wanted) + 1 - self.block_table.shape[1])
        row, block = on_device(wanted, self.block_table.device).T
        numbers = on_device(taken, self.block_table.device)
        self.block_table = F.pad(self.block_table, (0, more)).index_put((row, block), numbers)

    def _write(self, new: list[int], k: Tensor, v: Tensor) -> None:
        """Writes so many tokens of each sequence, the last that count as held: k and v ``(b, l, …)`` of all of them."""
        pool, size = self.pages.pool, self.pages.pool.page_size
        places: list[int] = []  # as if the pool were one row of tokens
        for row, end, l in zip(self.pages.rows, self.counts, new, strict=True):
            position = end - l
            while position < end:
                block, offset = divmod(position, size)
                some = min(size - offset, end - position)
                first = row[block] * size + offset
                places += range(first, first + some)
                position += some
        index = on_device(places, k.device, torch.int64)
        for cached, x in ((pool.keys, k), (pool.values, v)):
            cached.flatten(0, 1).index_copy_(0, index, x.flatten(0, 1))


def _blocks(keep: int, page_size: int) -> int:
    """Pages of a sequence of which ``keep`` tokens can still be seen, as it takes one token after another."""
    return keep // page_size + 2
