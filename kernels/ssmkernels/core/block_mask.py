"""Masks of attention that are stored by blocks: what is hidden costs nothing, what is visible a few bytes a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MEMBERS = {"offsets": torch.int32, "columns": torch.int32, "patterns": torch.int32, "bits": torch.uint8}
AT_ONCE = 2**23  # elements of blocks that are looked at together while a mask is made


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which keys each query sees, for all heads alike or for each its own.

    The ``(q_len, k_len)`` square is cut into blocks of ``block_size``; for each row of blocks the visible ones are
    listed, as in a sparse matrix of compressed rows. A block is visible as a whole or in part; then its pattern is kept
    as bits, once for all blocks that have the same. ``ssmkernels.masks`` makes masks, ``&`` and ``|`` join them.

    Indices are those of the tensors: query i and key j count from 0, also in a packed batch, over all of its sequences.
    To compare them, remember that attention aligns both ends: query i stands at key position i + k_len - q_len.

    Attributes:
        q_len, k_len: queries and keys.
        offsets: int32 ``(heads, rows + 1)``: entries ``offsets[h, r]`` to ``offsets[h, r + 1]`` of the two below belong
            to row r of head h; heads is 1 where all share the mask.
        columns: int32 ``(n)``, numbers of visible key blocks, rising within a row.
        patterns: int32 ``(n)``, -1 where all of the block is visible, else the number of its pattern in ``bits``.
        bits: uint8 ``(patterns, block_q, block_k / 8)``: bit t of byte s is key 8 s + t. Beyond the ends they are 0.

    Raises:
        TypeError, ValueError: members that do not make a mask, by name. Their values are read on the CPU alone, and not
            in compiled code.
    """

    q_len: int
    k_len: int
    offsets: Tensor
    columns: Tensor
    patterns: Tensor
    bits: Tensor

    def __post_init__(self) -> None:
        for name, dtype in MEMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"BlockMask: `{name}` must be a tensor of {dtype}; got {kind}")
            if value.device != self.offsets.device:
                raise ValueError(f"BlockMask: `{name}` must be on {self.offsets.device}; got {value.device}")
        if self.bits.ndim != 3 or 0 in self.bits.shape[1:]:
            raise ValueError(
                f"BlockMask: `bits` must have shape (patterns, block_q, block_k / 8); got {tuple(self.bits.shape)}"
            )
        rows, _ = self.grid_shape
        if self.offsets.ndim != 2 or self.offsets.shape[0] < 1 or self.offsets.shape[1] != rows + 1:
            raise ValueError(
                f"BlockMask: `offsets` must have shape (heads, {rows + 1}) for {self.q_len} queries in blocks of "
                f"{self.block_size[0]}; got {tuple(self.offsets.shape)}"
            )
        if self.columns.ndim != 1 or self.columns.shape != self.patterns.shape:
            came = tuple(self.columns.shape), tuple(self.patterns.shape)
            raise ValueError(f"BlockMask: `columns` and `patterns` must be as long as one another; got {came}")
        if self.offsets.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_values()

    def _check_values(self) -> None:
        borders = torch.cat([self.offsets[:1, 0], self.offsets[:, 1:].flatten()])
        joined = torch.equal(self.offsets[1:, 0], self.offsets[:-1, -1])
        if borders[0] != 0 or borders[-1] != len(self.columns) or (borders.diff() < 0).any() or not joined:
            raise ValueError(f"BlockMask: `offsets` must rise from 0 to {len(self.columns)}, the number of `columns`")
        _, columns = self.grid_shape
        rising = self.columns.diff() > 0
        starts = borders[1:-1]  # between two rows they may fall
        rising[starts[(starts > 0) & (starts < len(self.columns))].long() - 1] = True
        inside = (self.columns >= 0) & (self.columns < columns)
        if not inside.all() or not rising.all():
            raise ValueError(f"BlockMask: `columns` must lie below {columns} and rise within each row")
        if ((self.patterns < -1) | (self.patterns >= len(self.bits))).any():
            raise ValueError(f"BlockMask: `patterns` must be -1 or lie below {len(self.bits)}, the number of `bits`")

    def __repr__(self) -> str:
        return (
            f"BlockMask({self.q_len} queries, {self.k_len} keys, heads={self.heads}, block_size={self.block_size}, "
            f"{len(self.columns)} blocks visible ({self.density:.1%}), {int((self.patterns >= 0).sum())} of them in "
            f"part by {len(self.bits)} patterns, {self.nbytes} bytes)"
        )

    @property
    def heads(self) -> int:
        """1 where all heads share the mask."""
        return self.offsets.shape[0]

    @property
    def block_size(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self.bits.shape[1], 8 * self.bits.shape[2]

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        block_q, block_k = self.block_size
        return -(-self.q_len // block_q), -(-self.k_len // block_k)

    @property
    def density(self) -> float:
        """Visible blocks as a part of all."""
        rows, columns = self.grid_shape
        return len(self.columns) / max(1, self.heads * rows * columns)

    @property
    def nbytes(self) -> int:
        """Memory of all members."""
        return sum(getattr(self, name).nbytes for name in MEMBERS)

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask there; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        return BlockMask(self.q_len, self.k_len, *(getattr(self, name).to(device) for name in MEMBERS))

    def grid(self) -> Tensor:
        """int32 ``(heads, rows, columns)``: -2 for a hidden block, else what ``patterns`` says of it."""
        rows, columns = self.grid_shape
        grid = torch.full((self.heads * rows, columns), -2, dtype=torch.int32, device=self.device)
        counts = self.offsets.diff(dim=1).flatten()
        row = torch.arange(len(counts), device=self.device).repeat_interleave(counts)
        grid[row, self.columns.long()] = self.patterns
        return grid.unflatten(0, (self.heads, rows))

    def dense(self) -> Tensor:
        """bool ``(heads, q_len, k_len)``, True where a query sees a key. For tests and references: it is large."""
        grid = self.grid()
        seen = _contents(grid.flatten(), self.bits).unflatten(0, grid.shape)  # (heads rows columns block_q block_k)
        seen = seen.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return seen[:, : self.q_len, : self.k_len]

    def __and__(self, other: BlockMask) -> BlockMask:
        """What both show. Sizes must be the same; a mask of one head meets any number of heads."""
        a, b = self._beside(other, "&")
        full = (a == -1) & (b == -1)
        return self._joined(other, torch.logical_and, full, (a > -2) & (b > -2) & ~full)

    def __or__(self, other: BlockMask) -> BlockMask:
        """What either shows. Sizes must be the same; a mask of one head meets any number of heads."""
        a, b = self._beside(other, "|")
        full = (a == -1) | (b == -1)
        return self._joined(other, torch.logical_or, full, ((a > -2) | (b > -2)) & ~full)

    def _beside(self, other: BlockMask, sign: str) -> tuple[Tensor, Tensor]:
        """Both grids, once it is sure that they can be joined."""
        if not isinstance(other, BlockMask):
            raise TypeError(f"BlockMask: `{sign}` needs another BlockMask; got {type(other).__name__}")
        for of in ("q_len", "k_len", "block_size", "device"):
            mine, its = getattr(self, of), getattr(other, of)
            if mine != its:
                raise ValueError(f"BlockMask: `{sign}` needs masks of the same {of}; got {mine} and {its}")
        if self.heads != other.heads and 1 not in (self.heads, other.heads):
            raise ValueError(f"BlockMask: `{sign}` needs as many heads, or 1; got {self.heads} and {other.heads}")
        return self.grid(), other.grid()

    def _joined(
        self, other: BlockMask, join: Callable[[Tensor, Tensor], Tensor], full: Tensor, partly: Tensor
    ) -> BlockMask:
        a, b = (mask.grid().expand_as(full) for mask in (self, other))

        def contents(h: Tensor, r: Tensor, c: Tensor) -> Tensor:
            return join(_contents(a[h, r, c], self.bits), _contents(b[h, r, c], other.bits))

        alike = (a[partly].long() + 2) * (len(other.bits) + 2) + b[partly] + 2
        return from_blocks(self.q_len, self.k_len, self.block_size, full, partly, contents, alike)


def from_blocks(
    q_len: int,
    k_len: int,
    block_size: tuple[int, int],
    full: Tensor,
    partly: Tensor,
    contents: Callable[[Tensor, Tensor, Tensor], Tensor],
    alike: Tensor | None = None,
) -> BlockMask:
    """A mask from what is known of its blocks. At no time is more than a few million elements of it in memory.

    Args:
        block_size: queries and keys of a block; keys a multiple of 8.
        full: bool ``(heads, rows, columns)``: blocks that are visible as a whole.
        partly: likewise: blocks of which more must be known; they may turn out full or hidden.
        contents: takes numbers of heads, rows and columns, each ``(n)``; returns bool ``(n, block_q, block_k)``.
            What it says beyond the ends does not count.
        alike: int64 ``(n)``, for the n blocks of ``partly`` in their order: those of one number have the same contents,
            and one of them is asked for. None where nothing is known of it.
    """
    block_q, block_k = block_size
    heads, rows, columns = full.shape
    device = full.device
    cells = partly.nonzero()
    asked, source = cells, None
    if alike is not None:
        _, r, c = cells.unbind(1)
        key = 4 * alike + 2 * (r == rows - 1) + (c == columns - 1)  # the ends may cut it
        distinct, source = key.unique(return_inverse=True)
        asked = cells[cells.new_empty(len(distinct)).scatter_(0, source, torch.arange(len(cells), device=device))]
    codes: list[Tensor] = []
    bits = torch.empty(0, block_q, block_k // 8, dtype=torch.uint8, device=device)
    i, j = torch.arange(block_q, device=device)[:, None], torch.arange(block_k, device=device)
    for some in asked.split(max(1, AT_ONCE // (block_q * block_k))):
        h, r, c = some.unbind(1)
        inside = (r[:, None, None] * block_q + i < q_len) & (c[:, None, None] * block_k + j < k_len)
        seen = contents(h, r, c) & inside
        whole = (seen | ~inside).flatten(1).all(1)
        part = seen.flatten(1).any(1) & ~whole
        bits, number = torch.cat([bits, _packed(seen[part])]).unique(dim=0, return_inverse=True)
        known = len(number) - int(part.sum())  # those found before, which the new ones may have moved
        codes = [torch.where(code >= 0, number[code.clamp(min=0)], code) if known else code for code in codes]
        codes.append(torch.where(whole, -1, -2).masked_scatter(part, number[known:]))
    code = torch.cat(codes) if codes else cells.new_empty(0)
    grid = torch.full_like(full, -2, dtype=torch.int32).masked_fill_(full, -1)
    grid[partly] = (code if source is None else code[source]).int()
    visible = grid > -2
    before = torch.cat([cells.new_zeros(1), visible.sum(2).flatten().cumsum(0)])  # visible blocks before each row
    first = rows * torch.arange(heads, device=device)[:, None]
    return BlockMask(
        q_len,
        k_len,
        offsets=before[first + torch.arange(rows + 1, device=device)].int(),
        columns=visible.nonzero()[:, 2].int(),
        patterns=grid[visible],
        bits=bits,
    )


def _contents(patterns: Tensor, bits: Tensor) -> Tensor:
    """Blocks (n) by their entry of a grid → bool (n, block_q, block_k)."""
    hidden = bits.new_zeros(1, *bits.shape[1:])
    extended = torch.cat([hidden, ~hidden, bits])  # for -2, -1, 0 ...
    return unpacked(extended[patterns.long() + 2])


def _packed(seen: Tensor) -> Tensor:
    """bool (..., 8 n) → uint8 (..., n)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=seen.device)
    return (seen.to(torch.uint8).unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor) -> Tensor:
    """uint8 (..., n) → bool (..., 8 n)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(-2)
