"""One token of the linear recurrence, as a sequence of one for the kernels of whole sequences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor


def sequence_of_one(a: Any) -> tuple[Any, Tensor]:
    """The arguments of a sequence with this token alone, and the state as a kernel can write it.

    A kernel may write the final state where it has read the initial one: each of its tasks has channels of its own.
    """
    state = a.state.resolve_conj().contiguous()
    decay = a.a if a.a.ndim == 1 else a.a[:, None]
    return SimpleNamespace(a=decay, b=a.b[:, None], log_a=a.log_a, initial_state=state, cu_seqlens=None), state


def give_back(a: Any, state: Tensor) -> None:
    """Writes the state where the caller has it."""
    if state is not a.state:
        a.state.copy_(state)
