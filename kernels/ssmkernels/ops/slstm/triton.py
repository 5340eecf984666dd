"""The scalar memory in Triton: what it can run, and its launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import (
    all_registers,
    interpreting,
    kernels,
    missing,
    on_device_of,
    wrong_device,
)
from ssmkernels.ops.slstm.saved import PARTS, SAVES, empty
from ssmkernels.ops.ssd.triton_arguments import wide

__all__ = ["SAVES", "backward", "empty", "forward", "missing", "offline_cases", "unsupported"]

ROWS = 16  # sequences of a program: the least that a product takes
TILE = 16  # channels


def unsupported(a: Any) -> str | None:
    if a.x.dtype == torch.float64:
        return "float64"
    return "no heads or channels" if 0 in a.x.shape[-2:] else wrong_device(a)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    outputs = empty(a, save)
    y, *finals, gates, cells = outputs
    for final, part in zip(finals, PARTS, strict=True):  # of sequences without tokens
        start = getattr(a, f"initial_{part}")
        final.copy_(torch.zeros_like(final) if start is None else start)
    heads, depth = a.x.shape[3], a.x.shape[1] if save else 2
    if not save:
        cells = finals[0].new_empty((finals[0].shape[0], depth, heads, 4, a.x.shape[4]))
    one = a.x.shape[1] == 1 and a.cu_seqlens is None
    with on_device_of(a.x):
        _launch(
            "forward",
            a,
            tiles=-(-a.x.shape[4] // TILE) if one else 1,
            ONE=one,
            x=strided(a.x[:, :, 0]),
            x_gate=a.x.stride(2),
            bias=wide(a.bias),
            h=wide(a.initial_h),
            y=y,
            gates=gates if save else None,
            cells=cells,
            **{f"final_{part}": final for part, final in zip(PARTS, finals, strict=True)},
            depth=depth,
        )
    return outputs


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    gates, cells = saved.gates, saved.cells
    dgates = torch.empty_like(gates)
    s = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    carried = {}
    for part in PARTS:
        incoming = getattr(grads, f"final_{part}")
        new = cells.new_zeros((s, *a.x.shape[3:]))
        carried[f"d{part}"] = new if incoming is None else new + incoming
    with on_device_of(a.x):
        _launch("backward", a, gates=gates, cells=cells, dy=grads.y.contiguous(), dgates=dgates, **carried)
        dR = _of_weights(a, cells, dgates)
    dx = dgates.transpose(2, 3).to(a.x.dtype).contiguous()
    found: dict[str, Tensor | None] = {"x": dx, "R": dR, "bias": dgates.sum((0, 1))}
    return found | {f"initial_{part}": carried[f"d{part}"] for part in PARTS}


def _of_weights(a: Any, cells: Tensor, dgates: Tensor) -> Tensor:
    """The gradient of R, from the states at each token and the gates' gradients."""
    before = cells[:, :, :, 2].roll(1, 1)  # (b l h p)
    batch, length, heads, p = before.shape
    if length and a.cu_seqlens is None:
        before[:, 0] = 0 if a.initial_h is None else a.initial_h
    elif length:
        place = torch.arange(length, device=before.device, dtype=torch.int32)
        sequence = torch.searchsorted(a.cu_seqlens[1:].contiguous(), place, right=True)
        begins = place == a.cu_seqlens[sequence]
        first = 0 if a.initial_h is None else a.initial_h[sequence]
        before = torch.where(begins[:, None, None], first, before)
    dR = before.new_empty((heads, p, 4, p))
    block = 16 if interpreting() or p <= 16 else 32
    kernels(__package__).weights_backward[(heads * 4 * (-(-p // block)) ** 2,)](
        before=before,
        dgates=dgates,
        dR=dR,
        tokens=batch * length,
        H=heads,
        P=p,
        BLOCK_T=16 if interpreting() else 32,
        BLOCK_P=block,
        num_warps=4,
        **all_registers(),
    )
    return dR


def _launch(kernel: str, a: Any, tiles: int = 1, **fields: Any) -> None:
    batch, _, _, heads, p = a.x.shape
    sequences = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    programs = -(-sequences // ROWS) * heads * tiles
    if programs:
        getattr(kernels(__package__), kernel)[(programs,)](
            R=wide(a.R),
            **{part: wide(getattr(a, f"initial_{part}")) for part in ("c", "n", "m")},
            cu_seqlens=None if a.cu_seqlens is None else a.cu_seqlens.contiguous(),
            sequences=sequences,
            length=a.x.shape[1],
            H=heads,
            P=p,
            BLOCK_B=ROWS,
            BLOCK_P=TILE,
            **fields,
            num_warps=4,
            **all_registers(),
        )


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, p: int, packed: bool, plain: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, R, bias = meta(1, 64, 4, 4, p, dtype=dtype), meta(4, p, 4, p, dtype=dtype), meta(4, 4, p)
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        state = [None] * 4 if plain else [meta(3 if packed else 1, 4, p) for _ in range(4)]
        a = OPS["slstm"].declared.Arguments(x, R, None if plain else bias, *state, cu_seqlens)
        y, *finals, gates, cells = forward(a, True)
        forward(a, False)
        forward(a._replace(x=x[:, :1], cu_seqlens=None), False)
        saved = SimpleNamespace(gates=gates, cells=cells)
        incoming = {f"final_{part}": final for part, final in zip(PARTS, finals, strict=True)}
        backward(a, saved, SimpleNamespace(y=y, **incoming))

    for dtype, p, packed, plain in (
        (torch.bfloat16, 128, True, False),
        (torch.float32, 33, False, True),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, p {p}{', packed' * packed}"
        yield name, functools.partial(launches, dtype, p, packed, plain)
