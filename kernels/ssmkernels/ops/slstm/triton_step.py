"""The scalar memory's step in Triton: its forward pass over one token, whose tiles of channels are apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.names import OPS
from ssmkernels.core.triton_support import missing
from ssmkernels.ops.slstm import triton
from ssmkernels.ops.slstm.saved import PARTS

__all__ = ["forward", "missing", "unsupported"]


def unsupported(a: Any) -> str | None:
    return triton.unsupported(a)


def forward(a: Any, _: bool) -> Tensor:
    state = [getattr(a, part) for part in PARTS]
    y, *after = triton.forward(OPS["slstm"].declared.Arguments(a.x[:, None], a.R, a.bias, *state, None), False)
    for before, now in zip(state, after, strict=False):
        before.copy_(now)
    return y[:, 0]
