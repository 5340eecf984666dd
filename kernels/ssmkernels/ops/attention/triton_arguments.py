"""What attention's Triton kernels take of the arguments, where their tiles lie, and their launch settings."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import all_registers, interpreting, next_power_of_2, owners

LOG2E = math.log2(math.e)
WIDEST = 256  # head dim


def lacking(q: Tensor, v: Tensor) -> str | None:
    """What kernels lack that queries and values of these dtypes and head dims need; None where they have all."""
    if q.dtype == torch.float64:
        return "float64"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"head dims above {WIDEST}"
    return "the values have no head dim" if v.shape[3] == 0 else None


class Dims(NamedTuple):
    """The constants of the kernels that meet tiles, in one argument.

    Attributes:
        H, GROUP: heads, and how many of them share one of keys.
        K, V, BLOCK_K, BLOCK_V: channels of queries and values, and these rounded up.
        SOFTCAP: whether logits are capped.
        MASK_Q, MASK_K: queries and keys of a mask's block, 0 without a mask.
        ROWS, COLUMNS: queries and keys of a tile.
        HEADS: of a group, over which a program sums that has a tile of keys.
    """

    H: int
    GROUP: int
    K: int
    V: int
    SOFTCAP: bool
    MASK_Q: int
    MASK_K: int
    BLOCK_K: int
    BLOCK_V: int
    ROWS: int
    COLUMNS: int
    HEADS: int = 0


class Sides(NamedTuple):
    """Borders of packed sequences and tokens' own positions, of queries and of keys; None where there are none."""

    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    q_positions: Tensor | None
    k_positions: Tensor | None


class Places(NamedTuple):
    """Of each tile of a packed row, the sequence that it belongs to, and where it starts."""

    owners: Tensor | None
    starts: Tensor | None


class Lists(NamedTuple):
    """A mask's blocks, by the side that a program keeps; all None without a mask.

    Attributes:
        offsets: where each line's blocks begin in ``listed``, ``head`` numbers a head (0: all heads have the same).
        listed, patterns: the blocks of the other side, and which pattern of bits each shows (all of it, below 0).
        bits: of the patterns.
    """

    offsets: Tensor | None
    listed: Tensor | None
    patterns: Tensor | None
    bits: Tensor | None
    head: int


class Scales(NamedTuple):
    """Of products of queries and keys: what makes them logits to base 2, or the cap's argument; the cap; ``scale``."""

    factor: float
    cap: float
    scale: float


def settled(*given: Mapping[str, Any]) -> dict[str, Any]:
    """A launch's fields with the constants in one."""
    fields = {name: x for some in given for name, x in some.items()}
    found = {name: x for name, x in fields.items() if name not in Dims._fields}
    return found | {"dims": Dims(**{name: x for name, x in fields.items() if name in Dims._fields})}


def values(a: Any) -> dict[str, Any]:
    """What all kernels that meet tiles take, but for the tiles' own places and lists."""
    (l, h, k_size), (m, h_kv, v_size) = a.q.shape[1:], a.v.shape[1:]
    soft = a.softcap > 0
    return {
        "q": strided(a.q),
        "k": strided(a.k),
        "v": strided(a.v),
        "slopes": _dense(a.alibi_slopes),
        "sides": Sides(*map(_dense, (a.cu_seqlens, a.cu_seqlens_k, a.q_positions, a.k_positions))),
        "l": l,
        "m": m,
        "zero": 0,
        "left": a.left if a.q_positions is not None else min(a.left, l + m),
        "right": a.right if a.q_positions is not None else min(a.right, l + m),
        "scales": Scales(a.scale / a.softcap if soft else a.scale * LOG2E, a.softcap * LOG2E, a.scale),
        "H": h,
        "GROUP": h // h_kv,
        "K": k_size,
        "V": v_size,
        "SOFTCAP": soft,
        "MASK_Q": 0 if a.block_bits is None else a.block_bits.shape[1],
        "MASK_K": 0 if a.block_bits is None else 8 * a.block_bits.shape[2],
        "BLOCK_K": max(16, next_power_of_2(k_size)),
        "BLOCK_V": max(16, next_power_of_2(v_size)),
    }


def query_lists(a: Any) -> dict[str, Any]:
    """For each row of blocks the key blocks that it shows."""
    return _lists(a.block_offsets, a.block_columns, a.block_patterns, a.block_bits)


def key_lists(a: Any) -> dict[str, Any]:
    """For each column of blocks the query blocks that see it: the lists transposed, without a read on the host."""
    offsets, columns, patterns, bits = a.block_offsets, a.block_columns, a.block_patterns, a.block_bits
    if offsets is None:
        return query_lists(a)
    heads, rows = offsets.shape[0], offsets.shape[1] - 1
    count = -(-a.k.shape[1] // (8 * bits.shape[2]))
    number = torch.arange(len(columns), device=columns.device, dtype=torch.int32)
    line = torch.searchsorted(offsets[:, 1:].flatten(), number, right=True)  # head · rows + row
    head, row = line // max(1, rows), line % max(1, rows)
    place, order = torch.sort(head * count + columns, stable=True)  # rows keep their order
    firsts = count * torch.arange(heads, device=columns.device)[:, None]
    borders = firsts + torch.arange(count + 1, device=columns.device)
    offsets = torch.searchsorted(place, borders, out_int32=True)
    return _lists(offsets, row[order].int(), patterns[order], bits)


def _lists(
    offsets: Tensor | None, listed: Tensor | None, patterns: Tensor | None, bits: Tensor | None
) -> dict[str, Any]:
    head = 0 if offsets is None or offsets.shape[0] == 1 else offsets.shape[1]
    return {"lists": Lists(_dense(offsets), _dense(listed), _dense(patterns), _dense(bits), head)}


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def places(cu_seqlens: Tensor | None, length: int, mask_block: int, block: int) -> tuple[int, dict[str, Any]]:
    """How many tiles of at most ``block`` a row of a batch has and, where it is packed, each one's sequence and start.

    A tile lies within one sequence and one block of the mask, if there is one; some tiles of a packed row are empty.
    Nothing is read on the host.
    """
    per_block = -(-mask_block // block)
    tiles = -(-length // mask_block) * per_block if mask_block else -(-length // block)
    if cu_seqlens is None:
        return tiles, {"places": Places(None, None)}
    if mask_block:
        at = torch.arange(tiles, device=cu_seqlens.device, dtype=torch.int32)
        starts = torch.cat([at // per_block * mask_block + at % per_block * block, cu_seqlens[:-1]]).sort().values
        again = torch.cat([starts.new_zeros(1, dtype=torch.bool), starts[1:] == starts[:-1]])
        starts = torch.where(again, length, starts)
        owner = torch.searchsorted(cu_seqlens.contiguous(), starts, right=True, out_int32=True) - 1
        owner = owner.clamp(max=len(cu_seqlens) - 2).int()
    else:
        owner = owners(cu_seqlens, length, block)
        number = torch.arange(len(owner), device=cu_seqlens.device, dtype=torch.int32)
        first = cu_seqlens[owner]
        starts = first + (number - first // block - owner) * block
    return len(owner), {"places": Places(owner, starts)}


# Queries and keys of a tile, warps and stages of the pipeline, for head dims to 64, 128 and 256: what registers hold
TILES = {
    "hopper": {
        "forward": ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2)),
        "queries_backward": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        "keys_backward": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2)),
    },
    "ampere": {  # and all others, with no more than 99 KiB of shared memory
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 16, 4, 2)),
        "queries_backward": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 16, 8, 2)),
        "keys_backward": ((64, 128, 8, 2), (32, 64, 4, 2), (16, 64, 4, 2)),
    },
    "amd": {
        "forward": ((128, 64, 4, 2), (128, 64, 4, 2), (128, 32, 4, 2)),
        "queries_backward": ((128, 64, 4, 2), (128, 32, 4, 2), (64, 32, 4, 2)),
        "keys_backward": ((32, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1)),
    },
    "float32": {  # without tensor cores
        "forward": ((32, 32, 4, 2), (32, 16, 4, 1), (32, 16, 8, 1)),
        "queries_backward": ((32, 32, 4, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
        "keys_backward": ((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 8, 2)),
    },
    "interpreter": dict.fromkeys(("forward", "queries_backward", "keys_backward"), ((16, 16, 1, 1),) * 3),
}
TILES["blackwell"] = TILES["hopper"]  # of data centres
GATHERED = 32  # queries or keys of a tile at most, where it is gathered from several blocks of a mask


def options(kernel: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Launch settings by head dims, dtype and the mask's blocks, and never by length.

    A tile does not cross the mask's blocks on the side that its program keeps. On the other side it divides a block, or
    is gathered where that would make it small.
    """
    machine = _machine(fields["q"].at.dtype)
    widest = max(fields["BLOCK_K"], fields["BLOCK_V"])
    rows, columns, warps, stages = TILES[machine][kernel][0 if widest <= 64 else 1 if widest <= 128 else 2]
    if fields["MASK_Q"]:
        sides = (rows, fields["MASK_Q"]), (columns, fields["MASK_K"])
        (other, other_block), (own, own_block) = sides if kernel == "keys_backward" else sides[::-1]
        small = min(own, max(16, next_power_of_2(own_block)))
        warps = max(4, warps * small // own)  # each has as many rows as before
        other = _dividing(max(16, other // 2), other_block)  # the lists take registers
        if fields["SOFTCAP"] and fields["sides"].cu_seqlens is not None and widest > 64:
            small = max(16, small // 2)  # so do a soft cap and borders: with slopes besides, larger tiles would spill
        rows, columns = (other, small) if kernel == "keys_backward" else (small, other)
    if fields["sides"].q_positions is not None:  # those of both sides take registers too
        tight = machine == "ampere" and kernel == "forward"
        if widest > 128 and machine != "blackwell":  # its sums fill them: a smaller own side would free none
            rows, columns = (rows // 2, columns) if kernel == "keys_backward" else (rows, columns // 2)
        elif widest > 128 or tight or fields["MASK_Q"] or fields["slopes"] is not None:
            rows, columns = (rows, columns // 2) if kernel == "keys_backward" else (rows // 2, columns)
        rows, columns = max(16, rows), max(16, columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, "num_stages": stages, **all_registers()}


def _machine(dtype: torch.dtype) -> str:
    if interpreting():
        return "interpreter"
    if dtype == torch.float32:
        return "float32"
    target = importlib.import_module("triton.runtime").driver.active.get_current_target()
    if target.backend == "hip":
        return "amd"
    if 90 <= target.arch < 120:
        return "hopper" if target.arch < 100 else "blackwell"
    return "ampere"


def _dividing(tile: int, block: int) -> int:
    divisor = min(tile, block & -block)
    return divisor if divisor >= min(tile, GATHERED) else min(tile, GATHERED)
