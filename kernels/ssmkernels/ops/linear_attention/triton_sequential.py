"""Linear attention in Triton, token after token: its step, and float64, of which GPUs have no matrix products to gain.

The backward pass is given the states before every ``CHUNK`` tokens.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.strided import Strided, strided, strided_token
from ssmkernels.core.triton_support import all_registers, kernels, next_power_of_2
from ssmkernels.core.validate import precision
from ssmkernels.ops.linear_attention.gradients import added
from ssmkernels.ops.linear_attention.reference import scale_of

CHUNK = 64  # tokens between saved states
NUMBERS = 2048  # of a state that a program has in registers


class Dims(NamedTuple):
    """The constants of both kernels, as their module says: heads, channels, the decay's axes, and a program's part."""

    H: int
    GROUP: int
    K: int
    V: int
    DECAY: int
    SCALE: float
    WIDE: Any
    CHUNK: int
    BLOCK_K: int
    BLOCK_V: int


def blocks(a: Any) -> tuple[int, int, int]:
    """Key channels and value channels of a program, and how many programs a head has."""
    k, v = a.k.shape[-1], a.v.shape[-1]
    block_k = next_power_of_2(k)
    block_v = min(next_power_of_2(v), max(8, NUMBERS // block_k))
    return block_k, block_v, -(-v // block_v)


def chunks(a: Any) -> Any:
    """How many states are saved. Packed, sequence i's start at number cu_seqlens[i] // CHUNK + i."""
    batch, length = a.q.shape[:2]
    return batch * -(-length // CHUNK) if a.cu_seqlens is None else length // CHUNK + a.cu_seqlens.shape[0] - 1


def launch(kernel: str, a: Any, batch_axes: int, sequences: int, **fields: Any) -> None:
    """Runs a kernel with a call's arguments, which have so many axes for batch and time, and ``fields``."""
    block_k, block_v, tiles = blocks(a)
    heads, v = a.v.shape[-2:]
    log_decay, wide = a.log_decay, precision(a.q)
    axes = 0 if log_decay is None else log_decay.ndim
    along = strided if batch_axes == 2 else strided_token
    decay = along(log_decay) if axes != 1 else Strided(log_decay, 0, 0, log_decay.stride(0), 0)
    language = importlib.import_module("triton.language")
    dims = Dims(
        H=heads,
        GROUP=heads // a.k.shape[-2],
        K=a.k.shape[-1],
        V=v,
        DECAY=0 if log_decay is None else 1 if axes == 1 else axes - batch_axes + 1,
        SCALE=float(scale_of(a.scale, a.k)),
        WIDE=language.float64 if wide == torch.float64 else language.float32,
        CHUNK=CHUNK,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
    )
    programs = sequences * heads * tiles
    if programs:
        getattr(kernels(__package__), kernel)[(programs,)](
            q=along(a.q),
            k=along(a.k),
            v=along(a.v),
            log_decay=decay,
            bonus=None if a.bonus is None else a.bonus.contiguous(),
            **fields,
            length=a.q.shape[1] if batch_axes == 2 else 1,
            dims=dims,
            num_warps=4,
            **all_registers(),
        )


def plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(a: Any, o: Tensor, final_state: Tensor, starts: Tensor | None) -> None:
    launch(
        "forward",
        a,
        2,
        final_state.shape[0],
        initial=plain(a.initial_state),
        o=o,
        final=final_state,
        starts=starts,
        cu_seqlens=plain(a.cu_seqlens),
    )


def backward(a: Any, starts: Tensor, grads: Any) -> dict[str, Tensor | None]:
    wide = precision(a.q)
    (batch, length, _, k), heads = a.k.shape, a.v.shape[2]
    s = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    block_k, block_v, tiles = blocks(a)

    def parts(*shape: int) -> Tensor:
        return a.q.new_empty((tiles, *shape), dtype=wide)

    dq, dk, dv = parts(batch, length, heads, k), parts(batch, length, heads, k), a.v.new_empty(a.v.shape)
    d_decay = d_bonus = d_initial = None
    if a.log_decay is not None:
        d_decay = parts(s, heads) if a.log_decay.ndim == 1 else parts(*a.log_decay.shape)
    if a.bonus is not None:
        d_bonus = parts(s, heads, k)
    if a.initial_state is not None:
        d_initial = a.v.new_empty(a.initial_state.shape, dtype=wide)
    launch(
        "backward",
        a,
        2,
        s,
        starts=starts,
        kept=a.q.new_empty(s * heads * tiles, CHUNK, block_k, block_v, dtype=wide),
        d_o=grads.o.contiguous(),
        d_final=plain(grads.final_state),
        dq=dq,
        dk=dk,
        dv=dv,
        d_decay=d_decay,
        d_bonus=d_bonus,
        d_initial=d_initial,
        cu_seqlens=plain(a.cu_seqlens),
        part_key=batch * length * heads * k,
        part_token=batch * length * heads,
        part_sequence=s * heads,
    )
    d_decay, d_bonus = (None if t is None else added(t, 0) for t in (d_decay, d_bonus))
    return {
        "q": added(added(dq, 0).unflatten(2, (a.k.shape[2], -1)), 3),
        "k": added(added(dk, 0).unflatten(2, (a.k.shape[2], -1)), 3),
        "v": dv,
        "log_decay": added(d_decay, 0) if d_decay is not None and a.log_decay.ndim == 1 else d_decay,
        "bonus": None if d_bonus is None else added(d_bonus, 0),
        "initial_state": d_initial,
    }
