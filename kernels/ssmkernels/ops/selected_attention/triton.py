"""Attention to selected blocks in Triton: its launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import all_registers, kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.core.written import gradient_wanted
from ssmkernels.ops.attention.native import SAVES, empty
from ssmkernels.ops.attention.triton_arguments import lacking
from ssmkernels.ops.selected_attention import tiled
from ssmkernels.ops.selected_attention._layout import (
    count,
    distinct,
    heads_last,
    keys_back,
    of_keys,
    of_queries,
    queries_of_blocks,
    sums_by_head,
)

__all__ = ["SAVES", "backward", "checked", "empty", "forward", "missing", "offline_cases", "unsupported"]

WIDEST_SINGLE = 64  # head dim in float32 for which the backward pass has the registers

checked = tiled.checked


def unsupported(a: Any) -> str | None:
    if a.q.dtype == torch.float32 and max(a.q.shape[3], a.v.shape[3]) > WIDEST_SINGLE and gradient_wanted(a):
        return f"gradients in float32 with head dims above {WIDEST_SINGLE}, whose products' operands fill all registers"
    return lacking(a.q, a.v) or wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    g, fields = a.blocks.shape[2], _fields(a)
    q = fields["q"]
    out = q.new_zeros(*q.shape[:3], a.v.shape[3], dtype=torch.float32)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if out.numel():
        with on_device_of(a.q):
            kernels(__package__).attend[(q.shape[0] * q.shape[1],)](
                **_settled(fields, _by_query(a), _options(a)), out=out, lse=lse
            )
    return tiled.results(a, save, heads_last(out, g), sums_by_head(lse, g))


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor]:
    g, h_kv, fields = a.blocks.shape[2], a.k.shape[2], _fields(a)
    dout, lse, delta = tiled.of_rows(a, saved, grads)
    fields |= {"dout": dout.to(a.q.dtype), "lse": lse, "delta": delta}
    dq, dk, dv = (torch.zeros_like(fields[name], dtype=torch.float32) for name in "qkv")
    with on_device_of(a.q):
        if dq.numel():
            kernels(__package__).queries_backward[(dq.shape[0] * dq.shape[1],)](
                **_settled(fields, _by_query(a), _options(a)), dq=dq
            )
        if dk.numel() and dq.numel():
            options = _options(a, of_keys=True)
            parts = -(-a.block_size // options["KEYS"])
            kernels(__package__).keys_backward[(len(dk) * count(a) * parts,)](
                **_settled(fields, _by_block(a), options), parts=parts, dk=dk, dv=dv
            )
    return {"q": heads_last(dq, g), "k": keys_back(dk, h_kv), "v": keys_back(dv, h_kv)}


class Dims(NamedTuple):
    """The constants of the kernels, in one argument.

    Attributes:
        G, H_KV, GROUPS: selections, heads of keys, and heads that share a selection.
        K, V, SIZE: channels of keys and values, and keys of a block.
        KEYS, BLOCK_K, BLOCK_V: keys and channels that a program takes at once.
        ROWS: of a program with one query.
        LANES, QUERIES: rows of a query, and queries at once, of a program with keys.
    """

    G: int
    H_KV: int
    GROUPS: int
    K: int
    V: int
    SIZE: int
    KEYS: int
    BLOCK_K: int
    BLOCK_V: int
    ROWS: int = 0
    LANES: int = 0
    QUERIES: int = 0


def _settled(*given: dict[str, Any]) -> dict[str, Any]:
    """A launch's fields with the constants in one."""
    fields = {name: x for some in given for name, x in some.items()}
    found = {name: x for name, x in fields.items() if name not in Dims._fields}
    return found | {"dims": Dims(**{name: x for name, x in fields.items() if name in Dims._fields})}


def _fields(a: Any) -> dict[str, Any]:
    """What all kernels take."""
    dtype, g = a.q.dtype, a.blocks.shape[2]
    k_size, v_size = a.k.shape[3], a.v.shape[3]
    return {
        "q": of_queries(a.q, g, dtype),
        "k": of_keys(a.k, dtype),
        "v": of_keys(a.v, dtype),
        "l": a.q.shape[1],
        "m": a.k.shape[1],
        "scale": a.scale,
        "G": g,
        "H_KV": a.k.shape[2],
        "GROUPS": a.q.shape[2] // g,
        "K": k_size,
        "V": v_size,
        "SIZE": a.block_size,
        "BLOCK_K": max(16, next_power_of_2(k_size)),
        "BLOCK_V": max(16, next_power_of_2(v_size)),
    }


def _by_query(a: Any) -> dict[str, Any]:
    """The blocks of each query."""
    return {"blocks": distinct(a).int().contiguous(), "n": a.blocks.shape[3]}


def _by_block(a: Any) -> dict[str, Any]:
    """The queries of each block; on meta tensors, which cannot be searched, lists of their shapes."""
    blocks, rows = count(a), a.blocks.shape[0] * a.blocks.shape[2]
    if a.q.device.type == "meta":
        offsets, queries = (a.q.new_empty(1, dtype=torch.int64) for _ in range(2))
    else:
        ordered, queries = queries_of_blocks(distinct(a), blocks)
        offsets = torch.searchsorted(ordered, torch.arange(rows * blocks + 1, device=ordered.device))
    return {"offsets": offsets, "queries": queries, "count": blocks}


def _options(a: Any, of_keys: bool = False) -> dict[str, Any]:
    """Launch settings by head dims, dtype, and heads that share a selection."""
    widest = max(16, next_power_of_2(max(a.k.shape[3], a.v.shape[3])))
    groups = next_power_of_2(a.q.shape[2] // a.blocks.shape[2])
    single = a.q.dtype == torch.float32
    keys = min(32 if single else 64, max(16, (2048 if single else 4096) // widest))
    warps = 8 if single and of_keys else 4
    options = {"KEYS": keys, "num_warps": warps, "num_stages": 1 if single else 2, **all_registers(32 * warps)}
    if not of_keys:
        return options | {"ROWS": max(16, groups)}
    return options | {"LANES": groups, "QUERIES": max(1, (16 if single or widest > 128 else 32) // groups)}


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launch(dtype: torch.dtype, h: int, g: int, h_kv: int, k: int, size: int, back: bool) -> None:
        def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, x, blocks = made(1, 128, h, k), made(1, 128, h_kv, k), made(1, 128, g, 4, dtype=torch.int32)
        a = OPS["selected_attention"].declared.Arguments(q, x, x, blocks, size, 0.1, False)
        if not back:
            forward(a, True)
            return
        saved = SimpleNamespace(out=q, exact=made(0), logsums=made(1, h, 128, dtype=torch.float32))
        backward(a, saved, SimpleNamespace(out=q, lse=None))

    for dtype, h, g, h_kv, k, size in (
        (torch.bfloat16, 64, 4, 4, 128, 64),
        (torch.float16, 8, 8, 2, 64, 512),
        (torch.bfloat16, 16, 1, 1, 256, 64),
        (torch.float32, 16, 4, 4, 64, 64),
        (torch.float32, 4, 4, 4, 256, 16),
    ):
        for back in (False, True) if dtype != torch.float32 or k <= WIDEST_SINGLE else (False,):
            name = f"{str(dtype).removeprefix('torch.')}, h {h}, g {g}, h_kv {h_kv}, k {k}, blocks of {size}"
            name += ", backward" * back
            yield name, functools.partial(launch, dtype, h, g, h_kv, k, size, back)
