"""Attention over a cache in Triton: the launches of flash decoding's two kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import all_registers, kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.core.validate import precision
from ssmkernels.ops.attention.triton_arguments import lacking

__all__ = ["forward", "missing", "offline_cases", "unsupported"]

TALLEST = 64  # rows of a tile: queries times the heads that share keys
PARTS = 16  # that are joined at a time
LONG = 32768  # keys of a sequence that alone shall give each multiprocessor two parts
MULTIPROCESSORS = 132  # where there is no GPU to ask


def unsupported(a: Any) -> str | None:
    return lacking(a.q, a.v_cache) or wrong_device(a)


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    q, k_cache, v_cache, block_table, num_splits = a.q, a.k_cache, a.v_cache, a.block_table, a.num_splits
    (s, l, h, k_size), (page_size, h_kv, v_size) = q.shape, v_cache.shape[1:]
    out = q.new_empty(s, l, h, v_size)
    lse = q.new_empty((s, h, l) if a.return_lse else 0, dtype=precision(q))
    if out.numel() == 0:
        return out, lse
    room = page_size if block_table is None else block_table.shape[1] * page_size
    left = min(a.left, room)
    most = room if left < 0 else min(room, left + l)  # keys that any sequence's queries see
    part_keys = _part_keys(q, l * h // h_kv, h_kv)
    parts = -(-most // part_keys) if num_splits is None else min(num_splits, most)
    sums = q.new_empty((s, h_kv, l * h // h_kv, parts, v_size), dtype=torch.float32)
    tops, totals = (torch.empty_like(sums[..., 0]) for _ in range(2))
    common = {
        "sums": sums,
        "tops": tops,
        "totals": totals,
        "lengths": a.lengths,
        "lengths_step": a.lengths.stride(0),
        "l": l,
        "left": left,
        "parts": parts,
        "splits": num_splits or 0,
        "part_keys": part_keys,
        "H_KV": h_kv,
        "GROUP": h // h_kv,
        "V": v_size,
        "BLOCK_V": max(16, next_power_of_2(v_size)),
    }
    options = _options(q.dtype, l * h // h_kv, k_size, v_size)
    tiles = -(-l * h // h_kv // options["ROWS"])
    own = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": block_table,
        "slopes": None if a.alibi_slopes is None else a.alibi_slopes.contiguous(),
        "tiles": tiles,
        "scale": a.scale,
        "softcap": a.softcap,
        "K": k_size,
        "PAGE": 1 if block_table is None else page_size,
        "SOFTCAP": a.softcap > 0,
        **_strides(q, k_cache, v_cache, block_table),
    }
    with on_device_of(q):
        if parts:
            kernels(__package__).attend[(s * parts * h_kv * tiles,)](**common, **own, **options)
        kernels(__package__).join[(s * l * h,)](
            **common,
            sinks=None if a.sinks is None else a.sinks.contiguous(),
            out=out,
            lse=lse if a.return_lse else None,
            PARTS=PARTS,
            num_warps=4,
        )
    return out, lse


def _part_keys(q: Tensor, rows: int, h_kv: int) -> int:
    """Keys of a part, where nobody says how many parts: from the machine and the heads alone.

    Neither a neighbour nor the room in the cache has a say, so that a sequence gives the same bits in any company.
    Parts of many queries are longer: else their sums would be as much to write as their keys to read.
    """
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else MULTIPROCESSORS
    keys = next_power_of_2(LONG * h_kv // (2 * processors))
    return max(min(1024, max(128, keys)), next_power_of_2(8 * rows))


def _options(dtype: torch.dtype, rows: int, k_size: int, v_size: int) -> dict[str, Any]:
    """Launch settings by the number of rows, head dims and dtype."""
    block_k = max(16, next_power_of_2(k_size))
    widest = max(block_k, next_power_of_2(v_size))
    single = dtype == torch.float32  # its products take their operands through registers
    return {
        "ROWS": min(max(16, next_power_of_2(rows)), TALLEST // 2 if single or widest > 128 else TALLEST),
        "KEYS": min(64, max(16, (2048 if single else 8192) // widest)),
        "BLOCK_K": block_k,
        "num_warps": 8 if single else 4,
        "num_stages": 2,
        **all_registers(),
    }


def _strides(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> dict[str, int]:
    """In elements, by the kernel's names; a dense cache counts as one page a sequence."""
    names = {"q": ("sequence", "position", "head", "step")}
    names |= dict.fromkeys("kv", ("page", "position", "head", "step"))
    found: dict[str, int] = {}
    for tensor, (name, parts) in zip((q, k_cache, v_cache), names.items(), strict=True):
        found |= {f"{name}_{part}": stride for part, stride in zip(parts, tensor.stride(), strict=True)}
    table = (0, 0) if block_table is None else block_table.stride()
    return found | {"table_sequence": table[0], "table_block": table[1]}


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launch(dtype: torch.dtype, l: int, h: int, h_kv: int, k: int, v: int, page_size: int, biases: bool) -> None:
        def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        table = made(2, 64, dtype=torch.int32) if page_size else None
        pages = (128, page_size) if page_size else (2, 4096)
        left, softcap = (1000, 30.0) if biases else (-1, 0.0)
        slopes, sinks = (made(h) if biases else None for _ in range(2))
        q, k_cache, v_cache = made(2, l, h, k), made(*pages, h_kv, k), made(*pages, h_kv, v)
        lengths = made(2, dtype=torch.int32)
        Arguments = OPS["decode_attention"].declared.Arguments
        a = Arguments(q, k_cache, v_cache, lengths, table, left, 0.1, softcap, slopes, sinks, None, biases)
        forward(a, False)

    for dtype, l, h, h_kv, k, v, page_size, biases in (
        (torch.bfloat16, 1, 32, 4, 128, 128, 0, False),
        (torch.bfloat16, 1, 32, 4, 128, 128, 16, False),
        (torch.float16, 4, 32, 4, 64, 64, 16, True),
        (torch.bfloat16, 1, 128, 1, 192, 128, 0, False),
        (torch.bfloat16, 8, 32, 4, 256, 256, 3, True),
        (torch.float32, 1, 32, 4, 128, 128, 0, False),
        (torch.float32, 4, 32, 4, 64, 64, 16, False),
        (torch.float32, 8, 32, 4, 128, 128, 16, True),
        (torch.float32, 8, 16, 1, 256, 256, 0, True),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, l {l}, h {h}, h_kv {h_kv}, k {k}, v {v}"
        name += f", pages of {page_size}" * bool(page_size) + ", biases" * biases
        yield name, functools.partial(launch, dtype, l, h, h_kv, k, v, page_size, biases)
