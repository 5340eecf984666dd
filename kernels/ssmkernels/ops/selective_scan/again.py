"""The selective scan's formula once more, for second derivatives of its kernels' operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ssmkernels.ops.selective_scan import reference


def again(ctx: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """See :mod:`ssmkernels.core.double_backward`; of operators that take ``save`` last and give the chunks' states."""
    *tensors, initial_state, cu_seqlens, _ = ctx.saved_tensors
    return _by_reference, (*tensors, ctx.delta_softplus, initial_state, cu_seqlens, True)


def _by_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.selective_scan(*arguments[:-1])
