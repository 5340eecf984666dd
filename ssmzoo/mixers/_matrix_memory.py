"""What the layers around xLSTM's matrix memory share: its state, and a call of it."""

from __future__ import annotations

import dataclasses
from typing import cast

from torch import Tensor

from ssmkernels import mlstm, mlstm_step
from ssmzoo.mixers._xlstm import may_step
from ssmzoo.state import State


@dataclasses.dataclass
class MemoryState(State):
    """The matrix memory, its normaliser and its stabiliser, float32."""

    C: Tensor  # (s, h, k, v)
    n: Tensor  # (s, h, k)
    m: Tensor  # (s, h)

    @classmethod
    def empty(cls, like: Tensor, sequences: int, heads: int, keys: int, values: int) -> MemoryState:
        new = like.new_zeros
        return cls(new(sequences, heads, keys, values), new(sequences, heads, keys), new(sequences, heads))


def remember(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MemoryState | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, MemoryState | None]:
    """Outputs (b l h v), and the state after them if one came in; arguments as those of :func:`ssmkernels.mlstm`."""
    before = None if state is None else (state.C, state.n, state.m)
    if before is not None and q.shape[1] == 1 and cu_seqlens is None and may_step(q):
        return mlstm_step(before, *(t[:, 0] for t in (q, k, v, i, f)))[:, None], state
    found = mlstm(q, k, v, i, f, initial_state=before, return_final_state=True, cu_seqlens=cu_seqlens)
    y, after = cast(tuple[Tensor, tuple[Tensor, Tensor, Tensor]], found)
    return y, None if state is None else MemoryState(*after)
