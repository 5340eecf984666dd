"""The general delta rule's step in Triton: a sequence of one token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ssmkernels.core.triton_support import missing, wrong_device
from ssmkernels.ops.generalized_delta_rule.cpu_arguments import ACTIVATIONS
from ssmkernels.ops.generalized_delta_rule.triton_sequential import NUMBERS, launch

__all__ = ["forward", "missing", "unsupported"]


def unsupported(a: Any) -> str | None:
    if a.q.shape[-1] > NUMBERS:
        return f"heads of more than {NUMBERS} key channels"
    return "no heads or channels" if 0 in (*a.q.shape[-2:], a.v.shape[-1]) else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    own = a.state.contiguous()
    timed = {name: getattr(a, name)[:, None] for name in ACTIVATIONS}
    decay = None if a.log_decay is None else a.log_decay[:, None]
    sequence = SimpleNamespace(**timed, log_decay=decay, scale=a.scale, cu_seqlens=None)
    (o,) = a.declared.outputs(a)
    launch("forward", sequence, initial=own, o=o, final=own, starts=own, SAVE=False)
    if own is not a.state:
        a.state.copy_(own)
    return o
