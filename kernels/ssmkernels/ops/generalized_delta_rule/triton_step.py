"""The general delta rule's step in Triton: a sequence of one token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ssmkernels.core.triton_support import missing
from ssmkernels.ops.generalized_delta_rule.cpu_arguments import ACTIVATIONS
from ssmkernels.ops.generalized_delta_rule.triton import launch, unsupported

__all__ = ["forward", "missing", "unsupported"]


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
