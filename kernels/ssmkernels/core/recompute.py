"""Computing intermediate results again in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from ssmkernels.core.plain import in_transform

R = TypeVar("R")


def recomputed(function: Callable[..., R], *inputs: Any) -> R:
    """The function's result; where gradients are wanted it keeps only the inputs, and runs again on the way back.

    Compilers choose for themselves what to keep, and the transforms of ``torch.func`` know no such way.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
